"""What of Dovetail is usable on this machine, and for what is not: what is missing and the line that installs it."""

from __future__ import annotations

import dataclasses
import importlib.util

from dovetail.runtime.hardware import devices as device
from dovetail.runtime.hardware.cpu import instruction_flags

# An ONNX model that adds a number to itself: a session for it is the only proof that a provider can be had.
_PROBE = bytes.fromhex(
    "08083a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a0808"
    "0112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)
_CPU_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")  # from good to better for 8-bit weights


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One thing that may or may not be usable. `install` is a shell line, where one helps."""

    name: str
    usable: bool
    detail: str
    install: str | None = None


def examine() -> list[Part]:
    """Every part, tried rather than looked up where trying is cheap."""
    return [_target(), _draft_cpu(), _draft_cuda(), *_draft_openvino(), *_extras()]


def _target() -> Part:
    flags = instruction_flags()
    known = [name for name in _CPU_FLAGS if name in flags]
    best = f"instructions for 8-bit weights: {', '.join(known) or 'none known'}"
    usable = "CPU" in device.openvino_devices()
    return Part("target", usable, best if usable else "OpenVINO finds no CPU that it supports")


def _draft_cpu() -> Part:
    import onnxruntime as ort

    got = _provider("CPUExecutionProvider")
    return Part("draft cpu", got == "CPUExecutionProvider", f"ONNX Runtime {ort.__version__}")


def _draft_cuda() -> Part:
    driver = device.cuda_driver()
    why, install = device.why_no_cuda(0), None
    if why is None:
        import onnxruntime as ort

        ort.preload_dlls()
        if _provider(("CUDAExecutionProvider", {"device_id": "0"})) != "CUDAExecutionProvider":
            why = "a session did not get the CUDA provider: cuBLAS or cuDNN is missing"
            install = f"pip install 'dovetail[{_extra(device.cuda_build_version() or 0)}]'"
    elif driver is not None and driver.gpus and driver.cuda_version >= 12000:
        install = f"pip install 'dovetail[{_extra(driver.cuda_version)}]'"
    if why is not None or driver is None:
        return Part("draft cuda", False, str(why), install)
    gpus = ", ".join(f"cuda:{gpu.index} {gpu.name} ({gpu.memory_bytes / 2**30:.1f} GiB)" for gpu in driver.gpus)
    return Part("draft cuda", True, gpus)


def _extra(cuda_version: int) -> str:
    return "cuda13" if cuda_version >= 13000 else "cuda12"


def _draft_openvino() -> list[Part]:
    names = device.openvino_devices()
    parts = [Part(f"draft openvino:{name}", True, full) for name, full in names.items() if name[:3] in ("CPU", "GPU")]
    if not any(name.startswith("GPU") for name in names):
        detail = "no Intel GPU, or its OpenCL driver is missing"
        parts.append(Part("draft openvino:GPU", False, detail, "apt install intel-opencl-icd   # for an Intel GPU"))
    return parts


def _extras() -> list[Part]:
    """Commands that need packages of an extra."""
    needs = {
        "dovetail-export": ("export", ["torch", "transformers", "optimum", "nncf", "onnx"]),
        "dovetail bench": ("bench", ["openvino_genai", "llama_cpp", "gguf", "matplotlib", "transformers"]),
    }
    parts = []
    for name, (extra, packages) in needs.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        detail = "installed" if not missing else f"missing: {', '.join(missing)}"
        if missing and extra == "bench":
            detail += " (peers that are missing are skipped)"
        parts.append(Part(name, not missing, detail, f"pip install 'dovetail[{extra}]'" if missing else None))
    return parts


def _provider(provider: str | tuple[str, dict[str, str]]) -> str | None:
    """The provider that a session asked to run on `provider` really got; None if there was no session."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        return str(ort.InferenceSession(_PROBE, options, providers=[provider]).get_providers()[0])
    except Exception:  # ONNX Runtime has a dozen exception types and no common base but this
        return None
