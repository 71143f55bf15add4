"""Where a draft runs: the names of devices, what of them is usable on this machine, and loading a draft on one.

What counts is the provider that a session really got: ONNX Runtime lists CUDA as available wherever it was compiled in.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import TYPE_CHECKING, Any

from dovetail.runtime.errors import DeviceError

if TYPE_CHECKING:  # names of devices are checked before numpy is imported
    from pathlib import Path

    from dovetail.runtime.artifact.manifest import DraftInfo
    from dovetail.runtime.drafts.graph_contract import DraftGraph

_log = logging.getLogger(__name__)
NAMES = "auto, cpu, cuda, cuda:INDEX, openvino:CPU or openvino:GPU"
_CUDA_WORKSPACE_BYTES = 64 << 20  # what cuBLAS and the arena want besides weights and caches
_CUDA = re.compile(r"cuda(?::(\d{1,3}))?\Z")
_OPENVINO = re.compile(r"openvino:((?:CPU|GPU(?:\.\d{1,3})?))\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    index: int
    name: str
    memory_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class CudaDriver:
    """What the NVIDIA driver says. `cuda_version` is the newest it supports, as 1000 major + 10 minor."""

    cuda_version: int
    gpus: list[Gpu]


def check_device(device: str) -> None:
    """Raise `DeviceError` unless `device` is a name of one."""
    if device not in ("auto", "cpu") and not _CUDA.match(device) and not _OPENVINO.match(device):
        raise DeviceError(f"draft_device: expected {NAMES}, got {device!r:.40}")


def likely_device(device: str) -> str:
    """What `device` will be, `auto` included, as far as can be told without loading a model."""
    if device != "auto":
        return device
    return "cuda:0" if why_no_cuda(0) is None else "cpu"


def load_draft(
    path: Path,
    info: DraftInfo,
    *,
    device: str,
    threads: int,
    context_length: int,
    memory_limit: int | None = None,
) -> DraftGraph:
    """Load the draft graph at `path` on `device`; where, and for `auto` why, is logged.

    `auto` is the first NVIDIA GPU that the session really gets, else the CPU by ONNX Runtime, which was faster there
    than OpenVINO (docs/performance.md). `memory_limit` bounds the draft's bytes on its device. Raises `DeviceError`.
    """
    check_device(device)
    _check_memory(path, info, context_length, memory_limit)

    def on(name: str) -> DraftGraph:
        return _load(path, info, name, threads, context_length, memory_limit)

    if device != "auto":
        _log.info(f"draft: {info.kind} on {device}")
        return on(device)
    why = why_no_cuda(0)
    if why is None:
        try:
            model = on("cuda:0")
        except DeviceError as error:
            why = str(error)
        else:
            _log.info(f"draft: {info.kind} on cuda:0 (auto: an NVIDIA GPU that runs it)")
            return model
    _log.info(f"draft: {info.kind} on cpu (auto: {why})")
    return on("cpu")


def why_no_cuda(index: int) -> str | None:
    """Why the GPU numbered `index` can't be used, as far as can be told without loading a model; None if it can."""
    built_for = cuda_build_version()
    if built_for is None:
        return "this ONNX Runtime was built without CUDA; pip install 'dovetail[cuda13]'"
    driver = cuda_driver()
    if driver is None or not driver.gpus:
        return "no NVIDIA GPU with its driver on this machine"
    if index >= len(driver.gpus):
        last = len(driver.gpus) - 1
        return f"expected an index from 0 to {last}, got {index}"
    if driver.cuda_version // 1000 < built_for // 1000:
        remedy = "update the driver" + (", or pip install 'dovetail[cuda12]'" if built_for >= 13000 else "")
        return (
            f"expected a driver for CUDA {built_for // 1000} or newer, got one for CUDA "
            f"{driver.cuda_version // 1000}.{driver.cuda_version % 1000 // 10}; {remedy}"
        )
    return None


def cuda_build_version() -> int | None:
    """The CUDA that ONNX Runtime was built for, as 1000 major + 10 minor; None for a build without."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return None
    major, _, minor = str(getattr(ort, "cuda_version", "")).partition(".")
    return 1000 * int(major) + 10 * int(minor or 0) if major.isdigit() else 0


def cuda_driver() -> CudaDriver | None:
    """Ask the NVIDIA driver; None where there is none that answers."""
    import ctypes

    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if library.cuInit(0) or library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    if library.cuDeviceGetCount(ctypes.byref(count)):
        return None
    gpus = []
    for index in range(count.value):
        handle, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
        library.cuDeviceGet(ctypes.byref(handle), index)
        library.cuDeviceGetName(name, len(name), handle)
        library.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
        gpus.append(Gpu(index, name.value.decode(errors="replace"), size.value))
    return CudaDriver(version.value, gpus)


def openvino_devices() -> dict[str, str]:
    """OpenVINO's devices, such as CPU and GPU.0, and their full names."""
    import openvino as ov

    core = ov.Core()
    return {device: str(core.get_property(device, "FULL_DEVICE_NAME")) for device in core.available_devices}


def _load(
    path: Path, info: DraftInfo, device: str, threads: int, context_length: int, memory_limit: int | None
) -> DraftGraph:
    on_openvino = _OPENVINO.match(device)
    if on_openvino:
        from dovetail.runtime.drafts.openvino_graph import OpenVinoDraft

        name = on_openvino[1]
        usable = openvino_devices()
        if not any(found == name or found.startswith(f"{name}.") for found in usable):
            raise DeviceError(
                f"draft_device {device!r}: expected one of OpenVINO's devices ({', '.join(usable)}), got {name}; "
                "run dovetail doctor for what is usable"
            )
        return OpenVinoDraft(
            path, info, device=device, openvino_device=name, threads=threads, context_length=context_length
        )
    from dovetail.runtime.drafts.onnxruntime_graph import OnnxDraft

    provider: Any = "CPUExecutionProvider"
    on_cuda = _CUDA.match(device)
    if on_cuda:
        index = int(on_cuda[1] or 0)
        why = why_no_cuda(index)
        if why is not None:
            raise DeviceError(f"draft_device {device!r}: {why}; or use draft_device cpu")
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
    from dovetail.runtime.drafts.graph_contract import cache_names, cache_shape

    rows, width = cache_shape(info, context_length)
    weights = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    need = weights + 4 * rows * width * len(cache_names(info)) + _CUDA_WORKSPACE_BYTES
    if memory_limit is not None and memory_limit < need:
        raise DeviceError(
            f"draft_memory_limit: expected at least {need / 2**20:.0f} MiB ({weights / 2**20:.0f} of weights, the "
            f"rest cache for {context_length} tokens and workspace), got {memory_limit / 2**20:.0f} MiB; "
            "raise it, or lower ctx_size"
        )
