"""The draft's graph in ONNX Runtime, on the CPU or an NVIDIA GPU, by the same code: every input and output is bound to
memory that is known beforehand.

Keys, values and predicted features never leave the device: a call is given the front of the caches and writes its own
rows in place. Up go tokens, positions, masks and the features of newly verified tokens, down come the children.

Letters: T pairs and F feature rows in a call, R rows wanted, K children per row, H key/value heads, E head
size, D hidden size.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dovetail.runtime.artifact.manifest import DraftInfo
from dovetail.runtime.drafts.graph_contract import (
    CHILDREN_INPUT,
    Children,
    DraftCall,
    cache_names,
    cache_shape,
    check_inputs,
)
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.errors import ArtifactError, DeviceError, DraftError

FIRST_ROWS = 1024  # what the caches of a new text have; doubled when they are full
HIDDEN_ROWS = 64  # rows wanted by one call, at most: the widest level
CACHE_STEP = 64  # calls are given a multiple of it, the rest masked: one binding serves for as many tokens
HEAVY_OPERATORS = {
    "Attention",
    "DequantizeLinear",
    "LogSoftmax",
    "MatMul",
    "MatMulNBits",
    "RotaryEmbedding",
    "ScatterND",
    "TopK",
}


class OnnxDraft:
    """An ONNX Runtime session. See `DraftGraph`."""

    def __init__(
        self, path: Path, info: DraftInfo, *, device: str, threads: int, context_length: int, provider: Any
    ) -> None:
        """Load the graph at `path` on `provider` (as `InferenceSession` takes it), the device called `device`.

        Raises `ArtifactError` for a graph that can't be loaded, `DeviceError` if the session did not get the provider,
        or the provider lacks an operator.
        """
        import onnxruntime as ort

        self.info, self.device, self.context_length = info, device, context_length
        self.native_s = 0.0
        name = provider if isinstance(provider, str) else provider[0]
        self.device_type = "cuda" if name == "CUDAExecutionProvider" else "cpu"
        self.device_id = 0 if isinstance(provider, str) else int(provider[1]["device_id"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Idle workers that spin would take the target's cores between two draft calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # 8-bit weights: DequantizeLinear and MatMul become one operator that computes in 8 bits.
        options.add_session_config_entry("session.enable_dq_matmulnbits_fusion", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        if self.device_type == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            self.session = ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # ONNX Runtime has a dozen exception types and no common base but this
            reason = " ".join(str(error).split())[:200]
            if self.device_type == "cuda":
                raise DeviceError(
                    f"draft_device {device!r}: expected a GPU that loads the draft, got: {reason}; "
                    "free its memory, raise draft_memory_limit, or use draft_device cpu"
                ) from None
            raise ArtifactError(
                f"{path}: expected a draft that ONNX Runtime loads, got: {reason}; export again"
            ) from None
        got = self.session.get_providers()[0]
        if got != name:
            raise DeviceError(
                f"draft_device {device!r}: expected the session on {name}, got {got}; "
                "run dovetail doctor for what is missing, or use draft_device cpu"
            )
        shapes = {port.name: port.shape[-1] for port in self.session.get_inputs()}
        check_inputs({port: size if isinstance(size, int) else None for port, size in shapes.items()}, info, path)
        self.takes_count = CHILDREN_INPUT in shapes
        if self.device_type == "cuda":
            _require_operators(self.session, device)

    def sequence(self) -> ModelDraft:
        """A new text."""
        return ModelDraft(self, OnnxMemory(self))


class OnnxMemory:
    """Buffers on the session's device, and the bindings that name them. See `DraftMemory`."""

    # Memory is taken by the first call: what goes wrong there is the draft's failure, which the text survives.

    def __init__(self, model: OnnxDraft) -> None:
        self._model = model
        self._caches: list[Any] = []  # [rows, H * E] float32 each
        self._hidden: Any = None  # [HIDDEN_ROWS, D] float16: what the last call predicted, and the next one reads
        self._rows = 0
        self._longest, self._width = cache_shape(model.info, model.context_length)
        self._bound: dict[CallSize, BoundCall] = {}
        self.bytes_in = self.bytes_out = 0

    def run(self, call: DraftCall) -> Children:
        """See `DraftMemory.run`."""
        model, size = self._model, size_of(call)
        end = call.first_row + size.pairs
        given = max(_stepped(end), size.columns)  # cache rows of the call
        if end > self._longest:
            raise DraftError(f"expected at most {self._longest} cache rows, got {end}: the tree is too big")
        if given > self._rows:
            self._grow(given)
        bound = self._bound.get(size) or BoundCall(model, size, self._caches, self._hidden)
        if size.pairs <= HIDDEN_ROWS:  # a level, or the tokens of a round; a prompt comes once
            self._bound[size] = bound
        bound.fill(call, end, given)
        start = time.perf_counter()
        model.session.run_with_iobinding(bound.binding)
        model.native_s += time.perf_counter() - start
        self.bytes_in += bound.bytes_in
        self.bytes_out += bound.bytes_out
        return bound.children

    def _grow(self, rows: int) -> None:
        """Make room for `rows`. The only time that a cache is copied, and that it leaves the device."""
        import onnxruntime as ort

        info, place = self._model.info, (self._model.device_type, self._model.device_id)
        self._rows = max(rows, _stepped(min(max(FIRST_ROWS, 2 * self._rows), self._longest)))
        self._bound.clear()  # they name the old memory
        if self._hidden is None:
            shape = (HIDDEN_ROWS, info.hidden_size)
            self._hidden = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float16, *place)
        caches = []
        for i in range(len(cache_names(info))):
            new = np.zeros((self._rows, self._width), np.float32)  # masked rows must still be numbers
            if self._caches:
                old = self._caches[i].numpy()  # a view
                new[: len(old)] = old
            caches.append(ort.OrtValue.ortvalue_from_numpy(new, *place))
        self._caches = caches


class CallSize(NamedTuple):
    """Calls of one size have inputs of equal shapes, but for the caches."""

    pairs: int  # T
    columns: int  # of the tree mask
    wanted: int  # R
    children: int  # K
    features: int | None  # F; None: what the last call predicted, if anything


def size_of(call: DraftCall) -> CallSize:
    """The size of `call`. Its mask gets room for cache rows behind those in use, and before them."""
    features = None if call.features is None else len(call.features)
    columns = _stepped(len(call.visible[0])) + CACHE_STEP
    return CallSize(len(call.tokens), columns, call.wanted, call.children, features)


class BoundCall:
    """Calls of one size: input arrays, children, and the binding that names their memory. Later calls only fill it,
    which saves most of the host's time in a call.
    """

    def __init__(self, model: OnnxDraft, size: CallSize, caches: Sequence[Any], hidden: Any) -> None:
        """`caches` and `hidden` are the memory's."""
        self._model, self._size, self._caches, self._given = model, size, caches, 0
        info, place = model.info, (model.device_type, model.device_id)
        self.binding = model.session.io_binding()
        numbers = np.empty((4, size.pairs), np.int64)
        self._numbers, self._packing = numbers.data.cast("B"), struct.Struct(f"={numbers.size}q")
        mask = np.empty((size.pairs, size.columns), np.bool_)
        self._mask = mask.data.cast("B")
        self._features = np.empty((size.features or 0, info.hidden_size), np.float16)
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": numbers[0],
            "position_ids": numbers[1],
            "cache_rows": numbers[2],
            "logit_rows": np.arange(size.pairs - size.wanted, size.pairs),
            "tree_mask": mask,
        }
        if info.reads_features:
            self._arrays["feature_rows"] = numbers[3]
            # In one memory, too: hidden states are made of the features, which have been read by then.
            predicted = (size.wanted, info.hidden_size)
            self.binding.bind_output("hidden_states", *place, np.float16, predicted, hidden.data_ptr())
            if size.features is None:
                self.binding.bind_input("features", *place, np.float16, hidden.shape(), hidden.data_ptr())
            else:
                self._arrays["features"] = self._features
        if model.takes_count:
            self._arrays[CHILDREN_INPUT] = np.array([size.children])
        shape = (size.wanted, size.children if model.takes_count else info.top_k)
        self.children = Children(np.empty(shape, np.int32), np.empty(shape, np.float32))
        for name, made in (("top_token_ids", self.children.tokens), ("top_log_probs", self.children.log_probs)):
            self.binding.bind_output(name, "cpu", 0, made.dtype, made.shape, made.ctypes.data)
        self._bind_arrays()
        self.bytes_in = sum(array.nbytes for array in self._arrays.values())
        self.bytes_out = self.children.tokens.nbytes + self.children.log_probs.nbytes

    def fill(self, call: DraftCall, end: int, given: int) -> None:
        """Write `call`, which must have this size, into the arrays. Of the `given` cache rows `end` are in use."""
        rows = range(call.first_row, end)
        self._packing.pack_into(self._numbers, 0, *call.tokens, *call.positions, *rows, *call.feature_rows)
        behind = given - end  # rows not in use, all under the mask
        before = self._size.columns - behind - len(call.visible[0])
        self._mask[:] = b"".join([b"\1" * before + row + b"\0" * behind for row in call.visible])
        if call.features is not None:
            self._features[:] = call.features
        if given != self._given:
            self._bind_caches(given)
        if self._model.device_type != "cpu":  # to another device an input is copied when it is bound
            self._bind_arrays()

    def _bind_arrays(self) -> None:
        for name, array in self._arrays.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_caches(self, given: int) -> None:
        info, place = self._model.info, (self._model.device_type, self._model.device_id)
        shape = (given, info.num_kv_heads * info.head_dim)
        for name, cache in zip(cache_names(info), self._caches, strict=True):
            self.binding.bind_input(name, *place, np.float32, shape, cache.data_ptr())
            self.binding.bind_output(f"new_{name}", *place, np.float32, shape, cache.data_ptr())
        self._given = given


def _stepped(rows: int) -> int:
    """The next multiple of `CACHE_STEP`."""
    return -(-rows // CACHE_STEP) * CACHE_STEP


def _require_operators(session: Any, device: str) -> None:
    """Every operator that touches weights, caches, features or logits runs on the GPU; shapes are the host's work."""
    parts = session.get_provider_graph_assignment_info()
    on_host = {node.op_type for part in parts if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()}
    lacking = sorted(on_host & HEAVY_OPERATORS)
    if lacking:
        raise DeviceError(
            f"draft_device {device!r}: expected a CUDA provider with every operator of the draft, it lacks "
            f"{', '.join(lacking)}; install a newer onnxruntime-gpu, or use draft_device cpu"
        )
