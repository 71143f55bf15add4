"""Proves the default number of threads: the least of cores, CPU affinity and container quota, and never none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dovetail.runtime.hardware import threads


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({"cpu.max": "nonsense"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_quota_of_both_control_group_versions(files: dict[str, str], cpus: float, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._cgroup_cpus(tmp_path) == cpus


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cgroup_cpus", lambda: float("inf"))
    allowed = os.sched_getaffinity(0)
    assert threads.default_threads() <= len(allowed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {min(allowed)})
    assert threads.default_threads() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1000, 1064)))  # no such CPUs: one core each
    assert threads.default_threads() == 64
    monkeypatch.setattr(threads, "_cgroup_cpus", lambda: 0.3)
    assert threads.default_threads() == 1
