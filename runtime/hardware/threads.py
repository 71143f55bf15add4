"""How many threads this process may use: physical cores, its CPU affinity and its container's quota, whichever is
least.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def default_threads() -> int:
    """At least 1. Linux; elsewhere the number of CPUs."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    return max(1, math.ceil(min(_physical_cores(allowed), _cgroup_cpus())))


def _physical_cores(cpus: set[int]) -> int:
    """Distinct cores behind the logical CPUs: two hyper-threads share the units that a matrix product needs."""
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> float:
    """The quota in CPUs: cgroup v2 `cpu.max`, else v1 `cpu.cfs_quota_us`; infinite when there is none."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return math.inf
    try:
        cpus = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return math.inf
    return cpus if cpus > 0 else math.inf  # v1 writes -1 for "no quota"
