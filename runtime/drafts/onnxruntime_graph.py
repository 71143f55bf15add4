"""The draft's graph in ONNX Runtime, on the CPU or an NVIDIA GPU, by the same code: every input and output is bound to
memory that is known beforehand.

Keys, values and predicted features never leave the device: a call is given the front of the caches and writes its own
rows in place. Up go tokens, positions, masks and the features of newly verified tokens, down come the children.

Letters: as in `graph_contract`.
"""

from __future__ import annotations

import itertools
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
    JointCall,
    cache_names,
    check_inputs,
    join,
)
from dovetail.runtime.drafts.row_pool import ROWS_A_BLOCK, RowPool
from dovetail.runtime.errors import ArtifactError, DeviceError

FIRST_ROWS = 1024  # of the pool that have memory at first; doubled when they are in use
HIDDEN_ROWS = 64  # rows wanted by one call, at most: the widest level, over all texts of a call
MAX_BOUND = 64  # sizes of calls whose memory is kept
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


class OnnxRuntimeGraph:
    """An ONNX Runtime session and its caches. See `DraftGraph`."""

    def __init__(self, path: Path, info: DraftInfo, *, device: str, threads: int, max_rows: int, provider: Any) -> None:
        """Load the graph at `path` on `provider` (as `InferenceSession` takes it), the device called `device`.

        Raises `ArtifactError` for a graph that can't be loaded, `DeviceError` if the session did not get the provider,
        or the provider lacks an operator.
        """
        import onnxruntime as ort

        self.info, self.device = info, device
        self.pool = RowPool(max_rows)
        self.native_s = 0.0
        self.bytes_in = self.bytes_out = 0
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
        self._caches: list[Any] = []  # [rows, H * E] float32 each
        self._hidden: Any = None  # [HIDDEN_ROWS, D] float16: what the last call predicted, and the next one reads
        self._rows = 0
        self._bound: dict[CallSize, BoundCall] = {}

    def run(self, calls: Sequence[DraftCall]) -> list[Children]:
        """See `DraftGraph`."""
        # Memory is taken by the first call: what goes wrong there is the draft's failure, which the text survives.
        call = join(calls)
        if call.cache_rows > self._rows or self._hidden is None:
            self._enlarge(call.cache_rows)
        size = size_of(call)
        bound = self._bound.pop(size, None) or BoundCall(self, size, self._caches, self._hidden)
        self._bound[size] = bound  # the newest is last
        if len(self._bound) > MAX_BOUND:
            del self._bound[next(iter(self._bound))]
        bound.fill(call)
        start = time.perf_counter()
        self.session.run_with_iobinding(bound.binding)
        self.native_s += time.perf_counter() - start
        self.bytes_in += bound.bytes_in
        self.bytes_out += bound.bytes_out
        return call.split(bound.children.tokens, bound.children.log_probs)

    def clear(self, rows: Sequence[int]) -> None:
        """See `DraftGraph`. It is rare: the caches leave the device for it."""
        for i, cache in enumerate(self._caches):
            values = cache.numpy() if self.device_type == "cpu" else cache.numpy().copy()
            values[[row for row in rows if row < self._rows]] = 0
            if self.device_type != "cpu":
                self._caches[i] = self._on_device(values)
        if self.device_type != "cpu":
            self._bound.clear()

    def _enlarge(self, rows: int) -> None:
        """Make room for `rows`. The only time that a cache is copied, and that it leaves the device."""
        import onnxruntime as ort

        width = self.info.num_kv_heads * self.info.head_dim
        most = self.pool.max_blocks * ROWS_A_BLOCK
        self._rows = max(rows, min(max(FIRST_ROWS, 2 * self._rows), most))
        self._bound.clear()  # they name the old memory
        if self._hidden is None:
            shape = (HIDDEN_ROWS, self.info.hidden_size)
            self._hidden = ort.OrtValue.ortvalue_from_shape_and_type(
                shape, np.float16, self.device_type, self.device_id
            )
        caches = []
        for i in range(len(cache_names(self.info))):
            new = np.zeros((self._rows, width), np.float32)  # masked rows must still be numbers
            if self._caches:
                old = self._caches[i].numpy()  # a view
                new[: len(old)] = old
            caches.append(self._on_device(new))
        self._caches = caches

    def _on_device(self, values: npt.NDArray[Any]) -> Any:
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(values, self.device_type, self.device_id)


class CallSize(NamedTuple):
    """Calls of one size have inputs of equal shapes, but for the caches."""

    pairs: int  # T
    columns: int  # M
    wanted: int  # R
    children: int  # K
    features: int | None  # F; None: what the last call predicted, if anything


def size_of(call: JointCall) -> CallSize:
    """The size of `call`."""
    return CallSize(len(call.tokens), call.columns, len(call.logit_rows), call.children, call.num_features)


class BoundCall:
    """Calls of one size: input arrays, children, and the binding that names their memory. Later calls only fill it,
    which saves most of the host's time in a call.
    """

    def __init__(self, graph: OnnxRuntimeGraph, size: CallSize, caches: Sequence[Any], hidden: Any) -> None:
        """`caches` and `hidden` are the graph's."""
        self._graph, self._caches, self._cache_rows = graph, caches, 0
        info, place = graph.info, (graph.device_type, graph.device_id)
        self.binding = graph.session.io_binding()
        numbers = np.empty(4 * size.pairs + size.wanted, np.int64)
        self._numbers, self._packing = numbers.data.cast("B"), struct.Struct(f"={numbers.size}q")
        tokens, positions, rows, feature_rows = numbers[: 4 * size.pairs].reshape(4, -1)
        mask = np.empty((size.pairs, size.columns), np.bool_)
        self._mask = mask.data.cast("B")
        self._features = np.empty((size.features or 0, info.hidden_size), np.float16)
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": tokens,
            "position_ids": positions,
            "cache_rows": rows,
            "logit_rows": numbers[4 * size.pairs :],
            "tree_mask": mask,
        }
        if info.reads_features:
            self._arrays["feature_rows"] = feature_rows
            # In one memory, too: hidden states are made of the features, which have been read by then.
            predicted = (size.wanted, info.hidden_size)
            self.binding.bind_output("hidden_states", *place, np.float16, predicted, hidden.data_ptr())
            if size.features is None:
                self.binding.bind_input("features", *place, np.float16, hidden.shape(), hidden.data_ptr())
            else:
                self._arrays["features"] = self._features
        if graph.takes_count:
            self._arrays[CHILDREN_INPUT] = np.array([size.children])
        shape = (size.wanted, size.children if graph.takes_count else info.top_k)
        self.children = Children(np.empty(shape, np.int32), np.empty(shape, np.float32))
        for name, array in (("top_token_ids", self.children.tokens), ("top_log_probs", self.children.log_probs)):
            self.binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._bind_arrays()
        self.bytes_in = sum(array.nbytes for array in self._arrays.values())
        self.bytes_out = self.children.tokens.nbytes + self.children.log_probs.nbytes

    def fill(self, call: JointCall) -> None:
        """Write `call`, which must have this size, into the arrays."""
        self._packing.pack_into(
            self._numbers, 0, *call.tokens, *call.positions, *call.rows, *call.feature_rows, *call.logit_rows
        )
        self._mask[:] = call.mask
        if call.features is not None:
            ends = itertools.accumulate(map(len, call.features), initial=0)
            for (begin, end), features in zip(itertools.pairwise(ends), call.features, strict=True):
                self._features[begin:end] = features
        if call.cache_rows != self._cache_rows:
            self._bind_caches(call.cache_rows)
        if self._graph.device_type != "cpu":  # to another device an input is copied when it is bound
            self._bind_arrays()

    def _bind_arrays(self) -> None:
        for name, array in self._arrays.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_caches(self, rows: int) -> None:
        info, place = self._graph.info, (self._graph.device_type, self._graph.device_id)
        shape = (rows, info.num_kv_heads * info.head_dim)
        for name, cache in zip(cache_names(info), self._caches, strict=True):
            self.binding.bind_input(name, *place, np.float32, shape, cache.data_ptr())
            self.binding.bind_output(f"new_{name}", *place, np.float32, shape, cache.data_ptr())
        self._cache_rows = rows


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
