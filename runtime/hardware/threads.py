"""How many threads this process may use: physical cores, its CPU affinity and its container's quota, whichever is
least.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from dovetail.runtime.hardware.cpu import physical_cores


def default_threads() -> int:
    """At least 1. Linux; elsewhere the number of CPUs."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    return max(1, math.ceil(min(physical_cores(allowed), _cgroup_cpus())))


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
