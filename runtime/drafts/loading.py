"""Loading a draft on a device.

What counts is the provider that a session really got: ONNX Runtime lists CUDA as available wherever it was compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dovetail.runtime.artifact.manifest import DraftInfo
from dovetail.runtime.drafts.graph_contract import DraftGraph, cache_names, cache_shape
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.hardware.devices import check_device, cuda_index, openvino_devices, openvino_name, why_no_cuda

_CUDA_WORKSPACE_BYTES = 64 << 20  # what cuBLAS and the arena want besides weights and caches


def load_draft(
    path: Path,
    info: DraftInfo,
    *,
    device: str,
    threads: int,
    context_length: int,
    memory_limit: int | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> DraftGraph:
    """Load the draft graph at `path` on `device`; `notice` is told where, and for `auto` why.

    `auto` is the first NVIDIA GPU that the session really gets, else the CPU by ONNX Runtime, which was faster there
    than OpenVINO (docs/performance.md). `memory_limit` bounds the draft's bytes on its device. Raises `DeviceError`.
    """
    check_device(device)
    _check_memory(path, info, context_length, memory_limit)

    def on(name: str) -> DraftGraph:
        return _load(path, info, name, threads, context_length, memory_limit)

    if device != "auto":
        notice(f"draft: {info.kind} on {device}")
        return on(device)
    why = why_no_cuda(0)
    if why is None:
        try:
            model = on("cuda:0")
        except DeviceError as error:
            why = str(error)
        else:
            notice(f"draft: {info.kind} on cuda:0 (auto: an NVIDIA GPU that runs it)")
            return model
    notice(f"draft: {info.kind} on cpu (auto: {why})")
    return on("cpu")


def _load(
    path: Path, info: DraftInfo, device: str, threads: int, context_length: int, memory_limit: int | None
) -> DraftGraph:
    name = openvino_name(device)
    if name is not None:
        from dovetail.runtime.drafts.openvino_graph import OpenVinoDraft

        usable = openvino_devices()
        if not any(other == name or other.startswith(f"{name}.") for other in usable):
            raise DeviceError(
                f"--draft-device {device}: expected one of OpenVINO's devices ({', '.join(usable)}), got {name}; "
                "run dovetail doctor for what is usable"
            )
        return OpenVinoDraft(
            path, info, device=device, openvino_device=name, threads=threads, context_length=context_length
        )
    from dovetail.runtime.drafts.onnxruntime_graph import OnnxDraft

    provider: Any = "CPUExecutionProvider"
    index = cuda_index(device)
    if index is not None:
        why = why_no_cuda(index)
        if why is not None:
            raise DeviceError(f"--draft-device {device}: {why}; or use --draft-device cpu")
        provider = ("CUDAExecutionProvider", _cuda_settings(index, memory_limit))
    return OnnxDraft(path, info, device=device, threads=threads, context_length=context_length, provider=provider)


def _cuda_settings(index: int, memory_limit: int | None) -> dict[str, str]:
    import onnxruntime as ort

    ort.preload_dlls()  # finds cuBLAS and cuDNN among the Python packages, without torch
    settings = {"device_id": str(index), "arena_extend_strategy": "kSameAsRequested"}
    if memory_limit is not None:
        settings["gpu_mem_limit"] = str(memory_limit)
    return settings


def _check_memory(path: Path, info: DraftInfo, context_length: int, memory_limit: int | None) -> None:
    rows, width = cache_shape(info, context_length)
    weights = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    need = weights + 4 * rows * width * len(cache_names(info)) + _CUDA_WORKSPACE_BYTES
    if memory_limit is not None and memory_limit < need:
        raise DeviceError(
            f"--draft-memory-limit: expected at least {need / 2**20:.0f} MiB ({weights / 2**20:.0f} of weights, the "
            f"rest cache for {context_length} tokens and workspace), got {memory_limit / 2**20:.0f} MiB; "
            "raise it, or lower --ctx-size"
        )
