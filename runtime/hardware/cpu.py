"""The processor and the memory of this machine, as the Linux kernel tells of them."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_INFO = Path("/proc/cpuinfo")
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's


def processor(info: Path = _INFO) -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor, such as `model name` and `flags`; empty without that file."""
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """As the processor calls itself."""
    return processor().get("model name") or platform.processor() or platform.machine()


def instruction_flags() -> set[str]:
    """The extensions of the instruction set, such as avx2; empty where none are known."""
    fields = processor()
    return set((fields.get("flags") or fields.get("Features") or "").split())


def computes_bfloat16() -> bool:
    """Whether it multiplies bfloat16 natively: half the bytes of float32 then cost no extra instructions."""
    return bool(_BFLOAT16 & instruction_flags())


def physical_cores(cpus: set[int]) -> int:
    """Distinct cores behind the logical CPUs: two hyper-threads share the units that a matrix product needs."""
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def total_memory() -> int | None:
    """Bytes of the whole machine; None where the kernel does not tell."""
    return _meminfo("MemTotal", Path("/"))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be allocated without swapping: the kernel's estimate, or what is left below the container's
    limit (control groups of version 2 and 1) if that is less.
    """
    free = _meminfo("MemAvailable", root)
    free = 1 << 62 if free is None else free
    group, older = root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"
    for limit, used, stat in (
        (group / "memory.max", group / "memory.current", group / "memory.stat"),
        (older / "memory.limit_in_bytes", older / "memory.usage_in_bytes", older / "memory.stat"),
    ):
        try:
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", stat.read_text(), re.MULTILINE)
            reclaimable = int(cached[1]) if cached else 0  # files read once count as used, and give way
            free = min(free, int(limit.read_text()) - int(used.read_text()) + reclaimable)
        except (OSError, ValueError):  # not that version, or "max"
            continue
    return max(0, free)


def _meminfo(name: str, root: Path) -> int | None:
    try:
        line = re.search(rf"^{name}:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if line is None else int(line[1]) << 10
