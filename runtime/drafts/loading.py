"""Loading a draft on a device.

What counts is the provider that a session really got: ONNX Runtime lists CUDA as available wherever it was compiled in.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dovetail.runtime.artifact.manifest import DraftInfo
from dovetail.runtime.drafts.graph_contract import DraftGraph, row_bytes
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.hardware.devices import check_device, cuda_index, openvino_devices, openvino_name, why_no_cuda

TREE_ROWS = 1024  # of one text, for the expanded candidates of a tree
_CUDA_WORKSPACE_BYTES = 64 << 20  # what cuBLAS and the arena want besides weights and caches


_log = logging.getLogger(__name__)


def load_draft(
    path: Path,
    info: DraftInfo,
    *,
    device: str,
    threads: int,
    context_length: int,
    texts: int = 1,
    memory_limit: int | None = None,
) -> DraftGraph:
    """Load the draft graph at `path` on `device`, for up to `texts` texts at a time; the log says where, and for `auto`
    why.

    `auto` is the first NVIDIA GPU that the session really gets, else the CPU by ONNX Runtime, which was faster there
    than OpenVINO (docs/performance.md). `memory_limit` bounds the draft's bytes on its device, and so the rows that
    its texts share: who finds none left goes on without a draft. Raises `DeviceError`.
    """
    check_device(device)
    rows = context_length + TREE_ROWS
    max_rows = _rows_within(path, info, rows, rows * texts, memory_limit)

    def on(name: str) -> DraftGraph:
        return _load(path, info, name, threads, max_rows, memory_limit)

    if device != "auto":
        graph = on(device)
        _log.info("draft: %s on %s", info.kind, device)
        return graph
    why = why_no_cuda(0)
    if why is None:
        try:
            graph = on("cuda:0")
        except DeviceError as error:
            why = str(error)
        else:
            _log.info("draft: %s on cuda:0 (auto: an NVIDIA GPU that runs it)", info.kind)
            return graph
    _log.info("draft: %s on cpu (auto: %s)", info.kind, why)
    return on("cpu")


def _load(
    path: Path, info: DraftInfo, device: str, threads: int, max_rows: int, memory_limit: int | None
) -> DraftGraph:
    name = openvino_name(device)
    if name is not None:
        from dovetail.runtime.drafts.openvino_graph import OpenVinoGraph

        usable = openvino_devices()
        if not any(other == name or other.startswith(f"{name}.") for other in usable):
            raise DeviceError(
                f"draft_device {device!r}: expected one of OpenVINO's devices ({', '.join(usable)}), got {name}; "
                "run dovetail doctor for what is usable"
            )
        return OpenVinoGraph(path, info, device=device, openvino_device=name, threads=threads, max_rows=max_rows)
    from dovetail.runtime.drafts.onnxruntime_graph import OnnxRuntimeGraph

    provider: Any = "CPUExecutionProvider"
    index = cuda_index(device)
    if index is not None:
        why = why_no_cuda(index)
        if why is not None:
            raise DeviceError(f"draft_device {device!r}: {why}; or use draft_device cpu")
        provider = ("CUDAExecutionProvider", _cuda_settings(index, memory_limit))
    return OnnxRuntimeGraph(path, info, device=device, threads=threads, max_rows=max_rows, provider=provider)


def _cuda_settings(index: int, memory_limit: int | None) -> dict[str, str]:
    import onnxruntime as ort

    ort.preload_dlls()  # finds cuBLAS and cuDNN among the Python packages, without torch
    settings = {"device_id": str(index), "arena_extend_strategy": "kSameAsRequested"}
    if memory_limit is not None:
        settings["gpu_mem_limit"] = str(memory_limit)
    return settings


def _rows_within(path: Path, info: DraftInfo, least: int, most: int, memory_limit: int | None) -> int:
    """How many rows the pool may have: `most`, or what `memory_limit` leaves beside weights and workspace."""
    if memory_limit is None:
        return most
    weights = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    need = weights + least * row_bytes(info) + _CUDA_WORKSPACE_BYTES
    if memory_limit < need:
        raise DeviceError(
            f"draft_memory_limit: expected at least {need / 2**20:.0f} MiB ({weights / 2**20:.0f} of weights, the rest "
            f"{least} rows of cache for one text, and workspace), got {memory_limit / 2**20:.0f} MiB; raise it, or "
            "lower ctx_size"
        )
    return min(most, (memory_limit - weights - _CUDA_WORKSPACE_BYTES) // row_bytes(info))
