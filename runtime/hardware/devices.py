"""Where a draft can run: the names of devices, and what of them is usable on this machine."""

from __future__ import annotations

import ctypes
import dataclasses
import re

from dovetail.runtime.errors import DeviceError
from dovetail.runtime.hardware.openvino_core import openvino_core

NAMES = "auto, cpu, cuda, cuda:INDEX, openvino:CPU or openvino:GPU"
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
    if device not in ("auto", "cpu") and cuda_index(device) is None and openvino_name(device) is None:
        raise DeviceError(f"draft_device: expected {NAMES}, got {device!r:.40}")


def cuda_index(device: str) -> int | None:
    """Which NVIDIA GPU `device` names; None if it names none."""
    name = _CUDA.match(device)
    return None if name is None else int(name[1] or 0)


def openvino_name(device: str) -> str | None:
    """What OpenVINO calls `device`, such as GPU.0 for openvino:GPU.0; None if it names none of OpenVINO's."""
    name = _OPENVINO.match(device)
    return None if name is None else name[1]


def likely_device(device: str) -> str:
    """What `device` will be, `auto` included, as far as can be told without loading a model."""
    if device != "auto":
        return device
    return "cuda:0" if why_no_cuda(0) is None else "cpu"


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
    core = openvino_core()
    return {device: str(core.get_property(device, "FULL_DEVICE_NAME")) for device in core.available_devices}
