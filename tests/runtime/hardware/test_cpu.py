"""Proves what is read of the kernel's files: the processor's fields, its instructions, and memory below a container's
limit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.runtime.hardware import cpu
from dovetail.runtime.hardware.cpu import available_memory

FIRST = "processor\t: 0\nmodel name\t: A CPU @ 2.00GHz\nflags\t\t: fpu avx2 amx_bf16\n"
SECOND = "processor\t: 1\nmodel name\t: B\n"


def test_the_first_processor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"{FIRST}\n{SECOND}")
    fields = cpu.processor(tmp_path / "cpuinfo")
    assert fields["model name"] == "A CPU @ 2.00GHz"
    monkeypatch.setattr(cpu, "processor", lambda: fields)
    assert cpu.processor_name() == "A CPU @ 2.00GHz"
    assert cpu.instruction_flags() == {"fpu", "avx2", "amx_bf16"}
    assert cpu.computes_bfloat16()


def test_a_machine_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.processor(tmp_path / "none") == {}
    monkeypatch.setattr(cpu, "processor", dict)
    assert cpu.processor_name()
    assert not cpu.instruction_flags()
    assert not cpu.computes_bfloat16()
    assert available_memory(tmp_path) > 1 << 40


def test_the_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:  8000000 kB\n")
    assert available_memory(tmp_path) == 8_000_000 << 10
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    assert available_memory(tmp_path) == 8_000_000 << 10
    (group / "memory.max").write_text("5000000\n")
    assert available_memory(tmp_path) == 3_000_000
