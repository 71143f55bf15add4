"""The draft's graph in OpenVINO, from the same ONNX file: for Intel GPUs, and on a CPU beside ONNX Runtime.

OpenVINO has no in-place update of an input, so every call copies the caches in use: fine for short texts.

Letters: as in `graph_contract`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from openvino.frontend import FrontEndManager

from dovetail.runtime.artifact.manifest import DraftInfo
from dovetail.runtime.drafts.graph_contract import (
    CHILDREN_INPUT,
    Children,
    DraftCall,
    cache_names,
    check_inputs,
    join,
)
from dovetail.runtime.drafts.row_pool import ROWS_A_BLOCK, RowPool
from dovetail.runtime.errors import ArtifactError, DeviceError
from dovetail.runtime.hardware.openvino_core import openvino_core

FIRST_ROWS = 1024  # of the pool that have memory at first; doubled when they are in use


class OpenVinoGraph:
    """A compiled model, a request and numpy caches. See `DraftGraph`."""

    def __init__(
        self, path: Path, info: DraftInfo, *, device: str, openvino_device: str, threads: int, max_rows: int
    ) -> None:
        """Load the graph at `path` on OpenVINO's `openvino_device` (`CPU`, `GPU`, `GPU.1`), the device called `device`.

        Raises `ArtifactError` for a graph that can't be read, `DeviceError` for a device that can't run it.
        """
        self.info, self.device = info, device
        self.pool = RowPool(max_rows)
        self.native_s = 0.0
        self.bytes_in = self.bytes_out = 0
        try:
            front_end = FrontEndManager().load_by_framework("onnx")  # not by content: no other parser sees the file
            model = front_end.convert(front_end.load(str(path)))
        except Exception as error:  # the front end has exception types of its own and no common base but this
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{path}: expected a draft that OpenVINO reads, got: {reason}; export again") from None
        got = {port.any_name: port.partial_shape[-1] for port in model.inputs}
        check_inputs({name: n.get_length() if n.is_static else None for name, n in got.items()}, info, path)
        self.takes_count = CHILDREN_INPUT in got
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if openvino_device == "CPU":
            settings |= {"INFERENCE_NUM_THREADS": str(threads), "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}
        try:
            compiled = openvino_core().compile_model(model, openvino_device, settings)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise DeviceError(
                f"draft_device {device!r}: expected a device of OpenVINO that runs the draft, got: {reason}; "
                "run dovetail doctor for what is usable"
            ) from None
        self._request = compiled.create_infer_request()
        width = info.num_kv_heads * info.head_dim
        self._caches = {name: np.zeros((0, width), np.float32) for name in cache_names(info)}  # [rows, H * E]
        self._rows = 0
        self._hidden: npt.NDArray[Any] = np.zeros((0, info.hidden_size), np.float16)  # [R, D] of the last call

    def run(self, calls: Sequence[DraftCall]) -> list[Children]:
        """See `DraftGraph`."""
        call = join(calls)
        if call.cache_rows > self._rows:
            self._enlarge(call.cache_rows)
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.array(call.tokens, np.int64),
            "position_ids": np.array(call.positions, np.int64),
            "tree_mask": np.frombuffer(call.mask, np.bool_).reshape(-1, call.columns),
            "cache_rows": np.array(call.rows, np.int64),
            "logit_rows": np.array(call.logit_rows, np.int64),
        }
        if self.info.reads_features:
            features = self._hidden if call.features is None else np.concatenate(call.features).astype(np.float16)
            feeds["features"] = features
            feeds["feature_rows"] = np.array(call.feature_rows, np.int64)
        if self.takes_count:
            feeds[CHILDREN_INPUT] = np.array([call.children])
        self.bytes_in += sum(array.nbytes for array in feeds.values())
        feeds |= {name: cache[: call.cache_rows] for name, cache in self._caches.items()}
        start = time.perf_counter()
        outputs = self._request.infer(feeds, share_inputs=True, share_outputs=True)
        self.native_s += time.perf_counter() - start
        for name, cache in self._caches.items():
            cache[call.rows] = outputs[f"new_{name}"][call.rows]
        if self.info.reads_features:
            self._hidden = outputs["hidden_states"].copy()
        tokens, log_probs = outputs["top_token_ids"], outputs["top_log_probs"]
        self.bytes_out += tokens.nbytes + log_probs.nbytes + self._hidden.nbytes
        return call.split(tokens, log_probs)

    def clear(self, rows: Sequence[int]) -> None:
        """See `DraftGraph`."""
        for cache in self._caches.values():
            cache[[row for row in rows if row < self._rows]] = 0

    def _enlarge(self, rows: int) -> None:
        most = self.pool.max_blocks * ROWS_A_BLOCK
        self._rows = max(rows, min(max(FIRST_ROWS, 2 * self._rows), most))
        for name, old in self._caches.items():
            self._caches[name] = np.zeros((self._rows, old.shape[1]), np.float32)
            self._caches[name][: len(old)] = old
