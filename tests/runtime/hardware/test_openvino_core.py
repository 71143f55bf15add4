"""Proves that a signal is handled after pipelines were closed in any order: OpenVINO's Cores, where two of them
overlap, leave a stack for signals behind that is gone, so there is one for all.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ONE_CORE = ("runtime/hardware/openvino_core.py", "export/tokenizers/checking.py")
PROGRAM = """
import gc, os, signal, sys
from dovetail import load
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
first, second = (load(sys.argv[1], draft_device="openvino:CPU") for _ in range(2))
for pipe in (first, second):
    pipe.generate("def f(x):", max_new_tokens=4)
    pipe.close()
del pipe, first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_after_two_pipelines(tiny_artifact: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny_artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "handled\n"


def test_nobody_makes_a_core_of_their_own() -> None:
    makers = []
    for folder in ("runtime", "export", "calibration"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            if any("Core" in (getattr(call, "attr", ""), getattr(call, "id", "")) for call in calls):
                makers.append(path.relative_to(ROOT).as_posix())
    assert sorted(makers) == sorted(ONE_CORE)
