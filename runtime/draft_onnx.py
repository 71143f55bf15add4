"""The draft's graph in ONNX Runtime, on the CPU or an NVIDIA GPU, by the same code: every input and output is bound to
memory that is known beforehand.

Keys, values and predicted features never leave the device: a call is given the rows of the caches in use and writes
its own in place. Up go tokens, positions, masks and the features of newly verified tokens, down come the children.

Letters: C cache rows in use, H key/value heads, E head size, D hidden size, R rows wanted, K children per row.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dovetail.runtime.draft import Children, DraftCall, DraftSequence
from dovetail.runtime.errors import ArtifactError, DeviceError, DraftError
from dovetail.runtime.manifest import DraftInfo

TREE_ROWS = 1024  # cache rows for the expanded candidates of one tree
FIRST_ROWS = 1024  # what the caches of a new text have; doubled when they are full
HIDDEN_ROWS = 64  # rows wanted by one call, at most: the widest level
CALL_INPUTS = ("input_ids", "position_ids", "tree_mask", "cache_rows", "logit_rows")  # besides features and caches
HEAVY_OPERATORS = {"Attention", "DequantizeLinear", "MatMul", "MatMulNBits", "RotaryEmbedding", "ScatterND", "TopK"}


def cache_names(info: DraftInfo) -> list[str]:
    """Of the graph's cache inputs; the outputs' have `new_` in front."""
    return [f"{kind}_cache.{i}" for i in range(info.num_layers) for kind in ("key", "value")]


def cache_shape(info: DraftInfo, context_length: int) -> tuple[int, int]:
    """Of each cache of a text: [rows, H * E]."""
    return context_length + TREE_ROWS, info.num_kv_heads * info.head_dim


def check_inputs(got: dict[str, Any], info: DraftInfo, path: Path) -> None:
    """The graph has the inputs and last sizes that the manifest says; `got`: name -> last size, None where it is free.

    Raises `ArtifactError`.
    """
    expected: dict[str, Any] = dict.fromkeys(CALL_INPUTS)
    expected |= {"features": info.hidden_size, "feature_rows": None} if info.reads_features else {}
    expected |= dict.fromkeys(cache_names(info), info.num_kv_heads * info.head_dim)
    if got != expected:
        raise ArtifactError(f"{path}: expected the inputs {expected}, got {got}; export the artifact again")


class OnnxDraft:
    """An ONNX Runtime session. See `DraftModel`."""

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
                    f"--draft-device {device}: expected a GPU that loads the draft, got: {reason}; "
                    "free its memory, raise --draft-memory-limit, or use --draft-device cpu"
                ) from None
            raise ArtifactError(
                f"{path}: expected a draft that ONNX Runtime loads, got: {reason}; export again"
            ) from None
        got = self.session.get_providers()[0]
        if got != name:
            raise DeviceError(
                f"--draft-device {device}: expected the session on {name}, got {got}; "
                "run dovetail doctor for what is missing, or use --draft-device cpu"
            )
        shapes = {port.name: port.shape[-1] for port in self.session.get_inputs()}
        check_inputs({port: size if isinstance(size, int) else None for port, size in shapes.items()}, info, path)
        if self.device_type == "cuda":
            _require_operators(self.session, device)

    def sequence(self) -> DraftSequence:
        """A new text."""
        return DraftSequence(self, OnnxMemory(self))


class OnnxMemory:
    """Buffers on the session's device, and the binding that names them. See `DraftMemory`."""

    # Memory is taken by the first call: what goes wrong there is the draft's failure, which the text survives.

    def __init__(self, model: OnnxDraft) -> None:
        self._model = model
        self._rows = 0
        self._caches: list[Any] = []  # [rows, H * E] float32 each
        self._hidden: list[Any] = []  # two of [HIDDEN_ROWS, D] float16: read the one, write the other
        self._predicted = 0  # rows of the first that the last call wrote
        self._binding = model.session.io_binding()
        self.bytes_in = self.bytes_out = 0

    def run(self, call: DraftCall) -> Children:
        """See `DraftMemory.run`."""
        model, binding, info = self._model, self._binding, self._model.info
        place = (model.device_type, model.device_id)
        in_use = (int(call.cache_rows[-1]) + 1, info.num_kv_heads * info.head_dim)
        if in_use[0] > self._rows:
            self._grow(in_use[0])
        arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": call.tokens,
            "position_ids": call.positions,
            "tree_mask": call.tree_mask,
            "cache_rows": call.cache_rows,
            "logit_rows": call.logit_rows,
        }
        if info.reads_features:
            arrays["feature_rows"] = call.feature_rows
            if call.features is None:
                shape = (self._predicted, info.hidden_size)
                binding.bind_input("features", *place, np.float16, shape, self._hidden[0].data_ptr())
            else:
                arrays["features"] = call.features
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
            self.bytes_in += array.nbytes
        for name, cache in zip(cache_names(info), self._caches, strict=True):
            binding.bind_input(name, *place, np.float32, in_use, cache.data_ptr())
            binding.bind_output(f"new_{name}", *place, np.float32, in_use, cache.data_ptr())
        rows = len(call.logit_rows)
        children = Children(np.empty((rows, info.top_k), np.int32), np.empty((rows, info.top_k), np.float32))
        for name, made in (("top_token_ids", children.tokens), ("top_log_probs", children.log_probs)):
            binding.bind_output(name, "cpu", 0, made.dtype, made.shape, made.ctypes.data)
            self.bytes_out += made.nbytes
        if info.reads_features:
            hidden = (rows, info.hidden_size)
            binding.bind_output("hidden_states", *place, np.float16, hidden, self._hidden[1].data_ptr())
        start = time.perf_counter()
        model.session.run_with_iobinding(binding)
        model.native_s += time.perf_counter() - start
        self._hidden.reverse()
        self._predicted = rows
        return children

    def _grow(self, rows: int) -> None:
        """Make room for `rows`. The only time that a cache is copied, and that it leaves the device."""
        import onnxruntime as ort

        info, place = self._model.info, (self._model.device_type, self._model.device_id)
        longest, width = cache_shape(info, self._model.context_length)
        if rows > longest:
            raise DraftError(f"expected at most {longest} cache rows, got {rows}: the tree is too big")
        self._rows = min(max(rows, FIRST_ROWS, 2 * self._rows), longest)
        make, shape = ort.OrtValue.ortvalue_from_shape_and_type, (self._rows, width)
        if not self._caches:
            self._caches = [make(shape, np.float32, *place) for _ in cache_names(info)]
            self._hidden = [make((HIDDEN_ROWS, info.hidden_size), np.float16, *place) for _ in range(2)]
        for i, cache in enumerate(self._caches):
            old = cache.numpy()
            if len(old) < self._rows:
                new = np.zeros(shape, np.float32)
                new[: len(old)] = old
                self._caches[i] = ort.OrtValue.ortvalue_from_numpy(new, *place)


def _require_operators(session: Any, device: str) -> None:
    """Every operator that touches weights, caches or features runs on the GPU; shapes are the host's work."""
    parts = session.get_provider_graph_assignment_info()
    on_host = {node.op_type for part in parts if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()}
    lacking = sorted(on_host & HEAVY_OPERATORS)
    if lacking:
        raise DeviceError(
            f"--draft-device {device}: expected a CUDA provider with every operator of the draft, it lacks "
            f"{', '.join(lacking)}; install a newer onnxruntime-gpu, or use --draft-device cpu"
        )
