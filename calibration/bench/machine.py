"""The machine and the software that a figure was measured with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from dovetail.runtime.hardware.cpu import instruction_flags, total_memory
from dovetail.runtime.hardware.machine import Machine

_MATRIX_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_THREADING = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "GGML_")  # what changes how engines use threads


def describe_machine(machine: Machine, threads: int) -> dict[str, Any]:
    """Processor, cores, GPU, caches, memory, system, and how busy it was when asked."""
    flags, memory = instruction_flags(), total_memory()
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (_read(index / name) for name in ("type", "level", "size"))
        if kind != "Instruction":
            caches[f"L{level}"] = size
    return {
        "cpu": machine.cpu,
        "logical_cpus": machine.cpus,
        "gpu": machine.gpu,
        "threads": threads,
        "matrix_instructions": [flag for flag in _MATRIX_FLAGS if flag in flags],
        "caches": caches,
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_THREADING)},
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
