"""Proves that llama.cpp runs beside an artifact what is as large as it, made of what there is: of a checkpoint's
folder, of a GGUF file, or that file itself; and that what a GGUF file says of itself is read.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dovetail.calibration.bench import runners
from dovetail.calibration.bench.gguf_file import read_gguf
from dovetail.calibration.bench.runners import RUNNERS, Models
from dovetail.export.target.gguf_writer import write_gguf
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.errors import UserError

pytest.importorskip("gguf", reason="the extra `bench` is not installed")
LLAMA_CPP = [name for name in RUNNERS if name.startswith("llamacpp")]


@pytest.fixture(scope="module")
def gguf(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_checkpoint, out)
    return out


@pytest.fixture
def made(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The programs that were run to make files: module, names of their arguments; some file appears."""
    calls: list[list[str]] = []

    def run(words: Sequence[str]) -> None:
        names = [Path(word).name if os.sep in word else word for word in words[2:]]
        calls.append([names[0].rsplit(".", 1)[-1], *names[1:]])
        out = next(Path(word) for word in words if word.endswith(".gguf") and not Path(word).exists())
        shutil.copyfile(gguf, out)

    monkeypatch.setattr(runners, "own_command", run)
    return calls


def models_of(artifact: Path, weight_format: str, checkpoint: Path | None, work: Path) -> Models:
    opened = open_artifact(artifact)
    target = dataclasses.replace(opened.manifest.target, weight_format=weight_format)
    opened = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, target=target))
    return Models(opened, artifact, checkpoint, None, work)


def file_of(models: Models, runner: str) -> Path:
    options: dict[str, Any] = models.load_options(RUNNERS[runner], EngineConfig())
    return Path(options["gguf"])


def test_a_file_tells_what_it_is(gguf: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    file = read_gguf(gguf)
    assert (file.file_type, file.vocab_size, file.hidden_size) == ("Q8_0", config["vocab_size"], config["hidden_size"])
    assert file.summary.startswith("GGUF Q8_0, 8.")
    assert file.bytes_per_pass == sum(file.num_bytes.values()) - file.num_bytes["token_embd.weight"]
    (tmp_path / "text.gguf").write_text("GGUF")
    with pytest.raises(UserError, match="expected a GGUF file of a model"):
        read_gguf(tmp_path / "text.gguf")


@pytest.mark.parametrize(
    ("weight_format", "runner", "programs"),
    [
        ("int8", "llamacpp", [["gguf_writer", "--file-type", "Q8_0"]]),
        ("fp16", "llamacpp-lookup", [["gguf_writer", "--file-type", "F16"]]),
        ("int4", "llamacpp", [["gguf_writer", "--file-type", "F16"], ["gguf_quantizer", "Q4_0"]]),
        ("int4", "llamacpp-q4km", [["gguf_writer", "--file-type", "F16"], ["gguf_quantizer", "Q4_K_M"]]),
    ],
)
def test_files_made_of_a_folder(
    weight_format: str,
    runner: str,
    programs: list[list[str]],
    made: list[list[str]],
    tiny_artifact: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    models = models_of(tiny_artifact, weight_format, tiny_checkpoint, tmp_path / "work")
    assert models.lacking(RUNNERS[runner]) is None
    file = file_of(models, runner)
    assert [[word for word in call if "." not in word and word != tiny_checkpoint.name] for call in made] == programs
    assert made[-1][-1 if weight_format != "int4" else -2] == file.name
    assert programs[-1][-1] in file.name
    assert file_of(models, runner) == file
    assert len(made) == len(programs), "made once"


def test_files_made_of_a_file(made: list[list[str]], gguf: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    assert file_of(models_of(tiny_artifact, "int8", gguf, tmp_path), "llamacpp") == gguf
    kept = models_of(tiny_artifact, "keep", gguf, tmp_path)
    assert file_of(kept, "llamacpp") == gguf
    assert kept.memory_bytes(RUNNERS["llamacpp"]) > gguf.stat().st_size
    assert not made
    file = file_of(models_of(tiny_artifact, "int4", gguf, tmp_path), "llamacpp-q4km")
    assert made == [["gguf_quantizer", gguf.name, file.name, "Q4_K_M"]]


def test_runners_that_do_not_stand_beside(
    gguf: Path, tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {"int8": 3, "int4": 6, "fp32": 3, "keep": 3}
    for weight_format, count in beside.items():
        models = models_of(tiny_artifact, weight_format, gguf, tmp_path)
        assert sum(models.stands_beside(RUNNERS[name]) for name in LLAMA_CPP) == count, weight_format
    assert "beside int4" in str(models_of(tiny_artifact, "int8", gguf, tmp_path).lacking(RUNNERS["llamacpp-q4km"]))
    of_folder = models_of(tiny_artifact, "keep", tiny_checkpoint, tmp_path)
    assert "give that file as `checkpoint`" in str(of_folder.lacking(RUNNERS["llamacpp"]))
    of_file = models_of(tiny_artifact, "int8", gguf, tmp_path)
    assert "not tiny.gguf" in str(of_file.lacking(RUNNERS["transformers"]))
    mixed = dataclasses.replace(read_gguf(gguf), file_type="Q4_K_M")
    monkeypatch.setattr(runners, "read_gguf", lambda path: mixed)
    kept = models_of(tiny_artifact, "keep", gguf, tmp_path)
    assert not kept.stands_beside(RUNNERS["llamacpp-q4km"]), "llamacpp runs that file"


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: it is compiled, minutes"
)
def test_llama_cpp_makes_its_own_formats(gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    words = [sys.executable, "-m", "dovetail.calibration.bench.gguf_quantizer", str(gguf), str(out)]
    subprocess.run([*words, "Q4_0"], check=True, capture_output=True)
    file = read_gguf(out)
    assert file.file_type == "Q4_0"
    assert sum(file.num_bytes.values()) < 0.8 * sum(read_gguf(gguf).num_bytes.values())
    refused = subprocess.run([*words, "Q99"], check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "expected a type of llama.cpp" in refused.stderr
