"""Proves that nothing of ours tells anybody outside that it runs: no name is looked up, no connection tried, and no id
left in the user's home, unless reports are asked for. The same watch sees OpenVINO's and ONNX Runtime's reports where
they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.runtime.privacy import OPT_IN

SOURCE = Path(__file__).resolve().parents[1] / "support" / "processes" / "lookups.c"
LIBRARY = """
import sys, time
from dovetail.runtime import load
with load(sys.argv[1], draft="artifact") as pipe:
    pipe.generate("def f", max_new_tokens=2)
    time.sleep(2)
"""
# What an export imports, all at once: a whole one takes longer, and sends no more than its imports and conversions do.
EXPORT = """
import dovetail.export.convert.optimum_export
import nncf, time
from nncf.telemetry.wrapper import NNCFTelemetryStub, telemetry
from openvino.tools.ovc import telemetry_utils
assert isinstance(telemetry, NNCFTelemetryStub), "nncf would report compressions"
assert telemetry_utils.tm.__name__.endswith("telemetry_stub"), "the converter would report conversions"
time.sleep(1)
"""
PEER = """
import dovetail.calibration.bench.peers.genai
import openvino_genai, openvino, time
time.sleep(1)
"""
IMPORTED_BEFORE = """
import openvino_telemetry.utils.sender as before
from dovetail.runtime.privacy import send_no_reports
import onnxruntime
send_no_reports()
assert before.TelemetrySender.send.__module__ == "dovetail.runtime.privacy"
"""


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that writes down what a process looks up."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    made = tmp_path_factory.mktemp("watch") / "lookups.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", made, SOURCE], check=True)
    return made


Run = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def run(watch: Path, tmp_path: Path) -> Run:
    """Runs a command in an empty home; (what it asked the outside, files that it left there)."""

    def command(words: list[object], **more: str) -> tuple[list[str], list[str]]:
        home, lookups = tmp_path / "home", tmp_path / "lookups"
        home.mkdir()
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        given = {"HOME": str(home), "LOOKUPS": str(lookups), "LD_PRELOAD": str(watch)}
        environment = {**kept, **given, "HF_HUB_OFFLINE": "1", **more}
        done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        files = [str(path.relative_to(home)) for path in sorted(home.rglob("*")) if path.is_file()]
        return lookups.read_text().splitlines() if lookups.exists() else [], files

    return command


def test_the_watch_sees_what_the_engines_report_by_themselves(run: Run, shipped_artifact: Path) -> None:
    lookups, files = run([sys.executable, "-c", LIBRARY, shipped_artifact], **{OPT_IN: "1"})
    assert any("google-analytics" in line for line in lookups), lookups
    assert any("openvino" in name for name in files), files
    # ONNX Runtime's thread looks its service up after half a minute; its id and its database are there at once.
    assert any(name.endswith("deviceid") for name in files), files


COMMANDS = {
    "the library": ["-c", LIBRARY],
    "generate": ["-m", "dovetail.runtime.commands.cli", "generate", "ARTIFACT", "x", "-n", "2", "--draft", "artifact"],
    "doctor": ["-m", "dovetail.runtime.commands.cli", "doctor"],
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_run_asks_nobody_and_leaves_nothing(run: Run, what: str, shipped_artifact: Path) -> None:
    words: list[object] = [shipped_artifact if word == "ARTIFACT" else word for word in COMMANDS[what]]
    lookups, files = run([sys.executable, *words, *([shipped_artifact] if what == "the library" else [])])
    assert lookups == []
    assert [name for name in files if not name.startswith(".cache/dovetail/")] == []


@pytest.mark.parametrize("code", [EXPORT, PEER], ids=["export", "peer"])
def test_an_export_and_a_benchmark_ask_nobody(run: Run, code: str) -> None:
    lookups, files = run([sys.executable, "-c", code])
    assert lookups == []
    assert not [name for name in files if "intel" in name or "onnxruntime" in name], files


def test_what_was_imported_before_is_silenced_too(run: Run) -> None:
    assert run([sys.executable, "-c", IMPORTED_BEFORE])[0] == []


def test_what_the_user_has_set_stays() -> None:
    code = "import dovetail, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, expected in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name} | given
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
