"""The draft's graph in OpenVINO, from the same ONNX file: for Intel GPUs, and on a CPU beside ONNX Runtime.

OpenVINO has no in-place update of an input, so every call copies the caches in use: fine for short texts.

Letters: C cache rows in use, D hidden size, R rows wanted.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino.frontend import FrontEndManager

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
from dovetail.runtime.errors import ArtifactError, DeviceError


class OpenVinoDraft:
    """A compiled model. See `DraftGraph`."""

    def __init__(
        self, path: Path, info: DraftInfo, *, device: str, openvino_device: str, threads: int, context_length: int
    ) -> None:
        """Load the graph at `path` on OpenVINO's `openvino_device` (`CPU`, `GPU`, `GPU.1`), the device called `device`.

        Raises `ArtifactError` for a graph that can't be read, `DeviceError` for a device that can't run it.
        """
        self.info, self.device, self.context_length = info, device, context_length
        self.native_s = 0.0
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
            self.compiled = ov.Core().compile_model(model, openvino_device, settings)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise DeviceError(
                f"draft_device {device!r}: expected a device of OpenVINO that runs the draft, got: {reason}; "
                "run dovetail doctor for what is usable"
            ) from None

    def sequence(self) -> ModelDraft:
        """A new text."""
        return ModelDraft(self, OpenVinoMemory(self))


class OpenVinoMemory:
    """Numpy caches and a request. See `DraftMemory`."""

    def __init__(self, model: OpenVinoDraft) -> None:
        self._model = model
        self._request = model.compiled.create_infer_request()
        shape = cache_shape(model.info, model.context_length)
        self._caches = {name: np.zeros(shape, np.float32) for name in cache_names(model.info)}
        self._hidden: npt.NDArray[Any] = np.zeros((0, model.info.hidden_size), np.float16)  # [R, D] of the last call
        self.bytes_in = self.bytes_out = 0

    def run(self, call: DraftCall) -> Children:
        """See `DraftMemory.run`."""
        pairs = len(call.tokens)
        end = call.first_row + pairs
        rows = slice(call.first_row, end)
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.array(call.tokens, np.int64),
            "position_ids": np.array(call.positions, np.int64),
            "tree_mask": np.frombuffer(b"".join(call.visible), np.bool_).reshape(pairs, -1),
            "cache_rows": np.arange(call.first_row, end),
            "logit_rows": np.arange(pairs - call.wanted, pairs),
        }
        if self._model.info.reads_features:
            feeds["features"] = self._hidden if call.features is None else call.features.astype(np.float16)
            feeds["feature_rows"] = np.array(call.feature_rows, np.int64)
        if self._model.takes_count:
            feeds[CHILDREN_INPUT] = np.array([call.children])
        self.bytes_in += sum(array.nbytes for array in feeds.values())
        feeds |= {name: cache[:end] for name, cache in self._caches.items()}
        start = time.perf_counter()
        made = self._request.infer(feeds, share_inputs=True, share_outputs=True)
        self._model.native_s += time.perf_counter() - start
        for name, cache in self._caches.items():
            cache[rows] = made[f"new_{name}"][rows]
        if self._model.info.reads_features:
            self._hidden = made["hidden_states"].copy()
        children = Children(made["top_token_ids"], made["top_log_probs"])
        self.bytes_out += children.tokens.nbytes + children.log_probs.nbytes + self._hidden.nbytes
        return children
