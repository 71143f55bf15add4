"""What a measurement depends on: the processor, the cores this process may use, the GPU, the engines' versions."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

from dovetail.runtime.hardware.cpu import processor, processor_name
from dovetail.runtime.hardware.threads import default_threads

_ENGINES = ("openvino", "onnxruntime-gpu", "numpy", "dovetail")


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """`cpus` are logical and allowed to this process; `cores` is what `default_threads` makes of them."""

    cpu: str
    cpus: int
    cores: int
    gpu: str  # "none" without one
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """sha256 over all of it."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Machine) -> list[str]:
        """What `other` has otherwise, as `field: ours, theirs`."""
        names = [
            field.name for field in dataclasses.fields(self) if getattr(self, field.name) != getattr(other, field.name)
        ]
        return [f"{name}: {getattr(self, name)}, {getattr(other, name)}" for name in names]


def this_machine() -> Machine:
    """The one this process runs on."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(_cpu(), cpus, default_threads(), _gpu(), _versions())


def _cpu() -> str:
    """The model's name, with family and model number: a virtual machine may hide the name behind a vague one."""
    fields = processor()
    numbers = [
        f"{key.removeprefix('cpu ')} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields
    ]
    return f"{processor_name()} ({', '.join(numbers)})" if numbers else processor_name()


def _gpu(drivers: Path = Path("/proc/driver/nvidia")) -> str:
    """NVIDIA GPUs as their driver names them."""
    names = []
    for path in sorted(drivers.glob("gpus/*/information")):
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        names.append(fields.get("Model", "NVIDIA GPU").strip())
    return ", ".join(names) or "none"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _ENGINES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
