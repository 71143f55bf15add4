"""Proves that no fault of a disk loses anything: every writer of ours is refused (disk full, input/output error) or
killed at each of its steps, and what lies there is the old or the new; the same command then goes on to the same end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    made = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", made, SUPPORT / "faults" / "file_faults.c", "-ldl"], check=True
    )
    return made


def test_a_fault_at_any_step_of_a_writer_loses_nothing(library: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": path}
    command = [sys.executable, SUPPORT / "faults" / "file_writers.py", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(done.stdout.splitlines()[-1])
    print(runs)
    assert sum(one["runs"] for one in runs.values()) > 150
