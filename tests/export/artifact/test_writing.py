"""Proves that an export is whole or absent: what it writes opens here and in OpenVINO GenAI, bad input is one clear
error and changes nothing, and a killed or starved export leaves the old artifact and a tidy folder.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from models.tiny_llama import write_checkpoint, write_draft
from oracles.genai import genai_greedy

from dovetail.export.artifact import atomic_folder, source_models
from dovetail.export.artifact import writing as artifacts
from dovetail.export.artifact.atomic_folder import appearing
from dovetail.export.artifact.chat_templates import write_chat_templates
from dovetail.export.artifact.writing import write_artifact
from dovetail.export.commands.cli import dovetail_export, main
from dovetail.export.sources.finding import find_source
from dovetail.runtime.artifact import manifest as manifests
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import UserError
from dovetail.runtime.text.chat_format import ChatFormat
from dovetail.runtime.text.tokenizer import load_tokenizer


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written(tiny_artifact: Path, tiny_checkpoint: Path) -> None:
    opened = open_artifact(tiny_artifact)
    manifest = opened.manifest
    assert 130_000 < manifest.target.parameters < 170_000
    assert (manifest.target.hidden_size, manifest.target.vocab_size, manifest.target.context_length) == (64, 512, 512)
    assert manifest.draft is not None
    assert (manifest.draft.num_layers, manifest.draft.num_kv_heads, manifest.draft.head_dim) == (2, 2, 16)
    assert manifest.checks.tokens == artifacts.checks.TOKENS
    assert manifest.checks.target_kl_mean < 0.01
    assert manifest.checks.target_argmax_agreement > 0.9
    assert manifest.checks.draft_argmax_agreement is not None
    assert manifest.checks.draft_argmax_agreement > 0.8
    for name in manifest.files:
        assert stat.S_IMODE(opened.file(name).stat().st_mode) == 0o444
    assert opened.file(manifests.TARGET_WEIGHTS).stat().st_size < 2 * manifest.target.parameters
    assert json.loads(opened.file(manifests.GENERATION_CONFIG).read_text())["eos_token_id"] == 0
    everything = b"".join(snapshot(tiny_artifact).values())
    for place in (str(tiny_checkpoint), str(tiny_artifact.parent), sys.prefix):
        assert place.encode() not in everything, "a path of this machine is in the artifact"


def test_genai_opens_the_target_as_it_is(tiny_artifact: Path) -> None:
    assert genai_greedy(tiny_artifact / "target", ["def parse("], 8)[0]


def test_chat_template_is_carried_over(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for where in ("chat_template.jinja", "tokenizer_config.json"):
        source, folder = tmp_path / where / "source", tmp_path / where / "folder"
        shutil.copytree(tiny_checkpoint, source)
        (folder / "tokenizer").mkdir(parents=True)
        if where == "chat_template.jinja":
            (source / where).write_text("{{ messages }}")
        else:
            settings = json.loads((source / where).read_text())
            (source / where).write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
        artifacts._write_settings(find_source(source, None, False), folder)
        assert (folder / manifests.CHAT_TEMPLATE).read_text() == "{{ messages }}"


def test_templates_by_name(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokenizer").mkdir()
    write_chat_templates({"tool_use": "t", "default": "d", "rag": "r"}, tmp_path)
    assert (tmp_path / manifests.CHAT_TEMPLATE).read_text() == "d"
    assert (tmp_path / manifests.TOOL_USE_TEMPLATE).read_text() == "t"
    assert told.messages == ["chat templates: rag left out; default and tool_use are taken"]
    told.clear()
    (tmp_path / "other" / "tokenizer").mkdir(parents=True)
    write_chat_templates({"tool_use": "t", "rag": "r"}, tmp_path / "other")
    assert not list((tmp_path / "other" / "tokenizer").iterdir())
    assert "of rag, tool_use none is called default" in told.messages[0]
    write_chat_templates({}, tmp_path / "other")
    assert len(told.messages) == 1


def test_an_example_with_tools_is_of_their_template(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    templates = {"default": "d {{ messages[0].content }}", "tool_use": "t {{ tools | tojson }}"}
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    write_artifact(source, out)
    examples = json.loads((out / manifests.CHAT_EXAMPLES).read_text())["examples"]
    assert [example["text"][0] for example in examples] == ["d", "d", "d", "t"]
    artifact = open_artifact(out)
    chat = ChatFormat(artifact, load_tokenizer(artifact))
    assert chat.verify() == 4
    chat.close()


def no_folder(source: Path) -> None:
    shutil.rmtree(source)


def empty_folder(source: Path) -> None:
    shutil.rmtree(source)
    source.mkdir()


def not_causal(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))


def config_is_not_json(source: Path) -> None:
    (source / "config.json").write_text("{")


def no_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def odd_tokenizer(source: Path) -> None:
    document = json.loads((source / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {"type": "Telepathy"}
    (source / "tokenizer.json").write_text(json.dumps(document))


def pickled_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def truncated_weights(source: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (no_folder, "expected a checkpoint folder"),
        (empty_folder, "config.json"),
        (not_causal, "BertForMaskedLM"),
        (config_is_not_json, "JSON"),
        (no_tokenizer, "tokenizer.json"),
        (odd_tokenizer, "Telepathy"),
        (pickled_weights, "safetensors"),
        (truncated_weights, "expected"),
    ],
)
def test_bad_source_is_one_line(spoil: object, named: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    assert callable(spoil)
    spoil(source)
    with pytest.raises(UserError, match=named) as raised:
        write_artifact(source, out)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path != source) == [], "something was left behind"


@pytest.mark.parametrize(
    ("sizes", "named"), [({"vocab_size": 400}, "vocabulary 400"), ({"hidden_size": 32}, "hidden size 32")]
)
def test_a_draft_for_another_target(
    sizes: dict[str, int], named: str, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    elsewhere = tmp_path_factory.mktemp("other")
    draft = write_draft(elsewhere / "draft", write_checkpoint(elsewhere / "checkpoint", **sizes))
    with pytest.raises(UserError, match=f"draft {named} != target"):
        write_artifact(tiny_checkpoint, tmp_path / "out", draft=draft)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_draft(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a draft folder"):
        write_artifact(tiny_checkpoint, tmp_path / "out", draft=tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_out_exists(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UserError, match="`force`"):
        write_artifact(tiny_checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_command_line_errors(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, one line on stderr, nothing on stdout, no traceback."""
    out = str(tmp_path / "out")
    for arguments in (
        ["model", str(tmp_path / "none"), "-o", out],
        ["model", str(tiny_checkpoint), "-o", out, "--weight-format", "int3"],
        ["model", str(tiny_checkpoint), "-o", out, "--tree", "many"],
        ["draft", str(tiny_checkpoint), "-o", out, "--text", str(tmp_path / "none")],
        ["demo", "-o", out, "--minutes-target", "-1"],
        ["draft", str(tiny_checkpoint)],
    ):
        monkeypatch.setattr(sys, "argv", ["dovetail-export", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        stdout, stderr = capfd.readouterr()
        assert (stop.value.code, stdout) == (2, "")
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1, stderr
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_last_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        dovetail_export, ["model", str(tiny_checkpoint), "-o", str(tmp_path / "out"), "--json", "--tree", "8,3,2"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["target"]["weight_format"] == "int8"


# Writes the files of a ready artifact where it would compile them, which takes longer than all the rest of this test.
KILLED = """
import shutil, sys, time
from pathlib import Path
from dovetail.export.artifact import source_models as models, writing as artifact
from dovetail.runtime.artifact.opening import open_artifact

checkpoint, ready, out = map(Path, sys.argv[1:])
target = open_artifact(ready).manifest.target
models.NativeModel.reference_logits = lambda self, *rest: None
models.write_native_target = lambda *rest: shutil.copytree(ready / "target", rest[3] / "target") and target
artifact._write_genai_files = lambda *rest: None
artifact.checks.compare = lambda *arguments: (print("half-made", flush=True), time.sleep(60))
artifact.write_artifact(checkpoint, out, force=True)
"""


def test_killed_in_the_middle(tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL after everything but the manifest is written: the old artifact is intact, the next run tidies up."""
    out = tmp_path / "artifact"
    shutil.copytree(tiny_artifact, out)
    before = snapshot(out)
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(tiny_artifact), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half-made\n"
    with appearing(tmp_path / "artifact", force=True):  # a run beside it does not touch what the first is filling
        pass
    shutil.rmtree(out)
    shutil.copytree(tiny_artifact, out)
    assert len(list(tmp_path.glob(".artifact.partial-*"))) == 1
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert snapshot(out) == before
    assert len(list(tmp_path.glob(".artifact.partial-*"))) == 1
    manifest = write_artifact(tiny_checkpoint, out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert open_artifact(out).manifest == manifest
    assert manifest.draft is None, "the old artifact, which had a draft, was replaced"


def test_disk_full(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(source_models, "write_native_target", full)
    with pytest.raises(UserError, match="full disk"):
        write_artifact(tiny_checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_whose_writers_do_not_say_that_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's say only how much they wrote. As soon as the half-made folder is gone there is room again."""
    usage = shutil.disk_usage(tmp_path)

    def left(_: object) -> object:
        return usage._replace(free=100 if list(tmp_path.iterdir()) else usage.free)

    def fill() -> None:
        with appearing(tmp_path / "out"):
            raise OSError("135168 requested and 121856 written")

    monkeypatch.setattr(atomic_folder.shutil, "disk_usage", left)
    with pytest.raises(UserError, match="full disk"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a tiny disk needs root")
def test_a_disk_that_really_fills(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On a 600 kB disk: native writers (OpenVINO) hit the end of it, and some of them do not say so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a tmpfs here")
    try:
        with pytest.raises(UserError, match="full disk"):
            write_artifact(tiny_checkpoint, disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_replacing_is_one_step(tmp_path: Path) -> None:
    """A reader that looks all the time sees the old folder or the new one, never none and never a mixture."""
    goal = tmp_path / "goal"
    with appearing(goal) as folder:
        (folder / "a").write_text("old")
    with appearing(goal, force=True) as folder:
        (folder / "a").write_text("new")
        assert (goal / "a").read_text() == "old"
    assert (goal / "a").read_text() == "new"
    with pytest.raises(RuntimeError), appearing(goal, force=True) as folder:
        raise RuntimeError
    assert (goal / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["goal"]
    script = "import sys, pathlib; p = pathlib.Path(sys.argv[1])\nwhile True: p.read_text(); print('.', flush=True)"
    reader = subprocess.Popen(
        [sys.executable, "-c", script, str(goal / "a")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    time.sleep(0.2)
    for i in range(30):
        with appearing(goal, force=True) as folder:
            (folder / "a").write_text(str(i))
    assert reader.poll() is None, "the reader found no file at some moment"
    reader.kill()
    reader.communicate()
