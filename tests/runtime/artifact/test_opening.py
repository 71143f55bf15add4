"""Proves: an artifact opens when it is what its manifest says, links followed, and is refused in one line when not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models.plain_artifact import write_artifact

from dovetail.runtime import load
from dovetail.runtime.artifact import manifest
from dovetail.runtime.artifact import opening as artifact_module
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import ArtifactError, UserError

CONTENT = {
    manifest.TARGET_MODEL: b"<net/>",
    manifest.TARGET_WEIGHTS: bytes(range(256)) * 20,
    manifest.TOKENIZER: b"{}",
    "README.md": b"",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact", CONTENT)


def refusal(path: Path | str, *, trust: bool = False) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_artifact(path, trust=trust)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def test_opens(folder: Path) -> None:
    hashed: list[int] = []
    opened = open_artifact(folder, progress=hashed.append)
    assert sum(hashed) == sum(map(len, CONTENT.values()))
    assert opened.digest == hashlib.sha256((folder / manifest.MANIFEST_NAME).read_bytes()).hexdigest()
    assert opened.file("README.md") == folder / "README.md"
    assert opened.has("README.md")
    assert not opened.has(manifest.DRAFT_MODEL)
    with pytest.raises(ArtifactError, match=manifest.DRAFT_MODEL):
        opened.file(manifest.DRAFT_MODEL)


def test_the_folder_itself_may_be_reached_by_a_link(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    open_artifact(folder.parent / "link")


def test_hard_links_are_regular_files(folder: Path) -> None:
    os.link(folder / manifest.TARGET_WEIGHTS, folder.parent / "backup")
    open_artifact(folder)


def test_no_artifact_there(tmp_path: Path, folder: Path) -> None:
    assert "nothing there" in refusal(tmp_path / "nowhere")
    assert "manifest" in refusal(tmp_path)
    assert "something else" in refusal(folder / "README.md")
    assert "nothing there" in refusal("")
    with pytest.raises(ArtifactError):
        open_artifact("a\0b")
    refusal("x" * 5000)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _file_for_folder(path: Path) -> None:
    path.unlink()
    others = list(path.parent.iterdir())
    for other in others:
        other.unlink()
    path.parent.rmdir()
    path.parent.write_text("")


STRUCTURAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "deleted": (Path.unlink, "nothing there"),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "nothing there"),
    "a link to itself": (lambda path: (path.unlink(), path.symlink_to(path)), "symbolic links"),
    "a link to a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "a special file"),
    "a link to another file": (lambda path: (path.unlink(), path.symlink_to(path.with_suffix(".xml"))), "bytes, got"),
    "folder": (_folder, "a folder"),
    "fifo": (_fifo, "a special file"),
    "file for a folder": (_file_for_folder, "Not a directory"),
    "emptied": (lambda path: path.write_bytes(b""), "got 0"),
    "truncated": (lambda path: os.truncate(path, 1), "got 1"),
    "extended": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, got"),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("damage", STRUCTURAL)
def test_names_kinds_and_sizes_are_checked_even_on_trust(folder: Path, damage: str, trust: bool) -> None:
    change, expected = STRUCTURAL[damage]
    change(folder / manifest.TARGET_WEIGHTS)
    assert expected in refusal(folder, trust=trust)


def as_hub_clients(folder: Path, out: Path) -> Path:
    """Links to blobs whose names say nothing, and what git and the client leave besides."""
    blobs = out.with_name(f"{out.name}-blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        name = out / path.relative_to(folder)
        name.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / f"{number:064}")
        name.symlink_to(os.path.relpath(blobs / f"{number:064}", name.parent))
    (out / ".gitattributes").write_text("*.bin filter=lfs\n")
    (out / "target" / ".cache").mkdir()
    return out


def as_kubernetes_does(folder: Path, out: Path) -> Path:
    """Every name of the top folder a link through `..data`, which is one to the newest version."""
    shutil.copytree(folder, out / "..2026_11_27")
    (out / "..data").symlink_to("..2026_11_27")
    for path in (out / "..data").iterdir():
        (out / path.name).symlink_to(f"..data/{path.name}")
    return out


@pytest.mark.parametrize("layout", [as_hub_clients, as_kubernetes_does])
def test_layouts_of_links(
    folder: Path, layout: Callable[[Path, Path], Path], tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    linked = layout(folder, tmp_path / "linked")
    opened = open_artifact(linked)
    assert opened.digest == open_artifact(folder).digest
    for name, data in CONTENT.items():
        assert not opened.file(name).is_symlink()
        assert opened.file(name).read_bytes() == data
    assert told.messages == [], "hidden names are no news"
    place = opened.file(manifest.TARGET_WEIGHTS)
    place.write_bytes(place.read_bytes()[::-1])
    assert "expected sha256" in refusal(linked)


@pytest.mark.parametrize("layout", [as_hub_clients, as_kubernetes_does])
def test_a_link_that_changes_behind_the_check_changes_nothing(
    folder: Path, layout: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    opened = open_artifact(layout(folder, tmp_path / "linked"))
    for path in [*(tmp_path / "linked").iterdir(), tmp_path / "linked" / "target" / "openvino_model.xml"]:
        if path.is_symlink():
            path.unlink()
            path.symlink_to("/dev/zero")
    for name, data in CONTENT.items():
        assert opened.file(name).read_bytes() == data


@pytest.mark.parametrize("layout", [as_hub_clients, as_kubernetes_does])
def test_the_engines_read_files_behind_links(
    shipped_artifact: Path, layout: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    expected = None
    linked = layout(shipped_artifact, tmp_path / "linked")
    for path, device in ((shipped_artifact, "cpu"), (linked, "cpu"), (linked, "openvino:CPU")):
        with load(path, draft="artifact", draft_device=device, profile=None) as pipe:
            done = pipe.generate("def main(argv):", max_new_tokens=8)
        expected = expected or done.token_ids
        assert done.token_ids == expected
        assert done.accepted_tokens > 0
    assert "cp -rL" in refusal(_with_external_data(tmp_path))


def _with_external_data(tmp_path: Path) -> Path:
    """A draft whose graph would look for its weights beside itself, under their own name."""
    files = {**CONTENT, manifest.DRAFT_MODEL: b"graph", f"{manifest.DRAFT_MODEL}.data": b"weights"}
    whole = write_artifact(tmp_path / "whole", files)
    open_artifact(whole)
    return as_hub_clients(whole, tmp_path / "external")


def test_what_lies_there_besides_is_told_and_not_read(folder: Path, told: pytest.LogCaptureFixture) -> None:
    (folder / "target" / "more\nerror: x").write_text("")
    (folder / "lost+found").mkdir(mode=0)
    (folder / ".hidden").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    open_artifact(folder)
    assert told.messages == ["dovetail.json lists no 'lost+found', 'pipe', 'target/more\\nerror: x': not read"]
    for name in "abc":
        (folder / name).touch()
    told.clear()
    open_artifact(folder)
    assert told.messages == ["dovetail.json lists no 'a', 'b', 'c' and 3 more: not read"]


def test_a_draft_that_the_artifact_lacks_can_not_be_asked_for(shipped_artifact: Path, tmp_path: Path) -> None:
    out = shutil.copytree(shipped_artifact, tmp_path / "plain")
    document = json.loads((out / manifest.MANIFEST_NAME).read_text())
    document["draft"], document["default_tree"] = None, {"nodes": 1, "depth": 0, "width": 1}
    (out / manifest.MANIFEST_NAME).chmod(0o644)
    (out / manifest.MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(UserError, match="draft 'artifact': expected an artifact with a draft, got one without"):
        load(out, draft="artifact")


@pytest.mark.parametrize("name", [name for name, data in CONTENT.items() if data])
def test_a_flipped_byte(folder: Path, name: str) -> None:
    data = bytearray(CONTENT[name])
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    assert f"{name}: expected sha256" in refusal(folder)
    open_artifact(folder, trust=True)


def test_a_file_that_grows_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_module, "_check_size", lambda path, expected: None)
    (folder / manifest.TOKENIZER).write_bytes(b"x" * 5_000_000)
    hashed: list[int] = []
    with pytest.raises(ArtifactError, match="expected sha256"):
        open_artifact(folder, progress=hashed.append)
    assert sum(hashed) < 10_000


def test_the_manifest_itself(folder: Path) -> None:
    path = folder / manifest.MANIFEST_NAME
    good = path.read_bytes()
    path.write_bytes(good + b" " * manifest.MAX_MANIFEST_BYTES)
    assert f"at most {manifest.MAX_MANIFEST_BYTES} bytes" in refusal(folder)
    path.write_bytes(good)
    _fifo(path)
    assert "special file" in refusal(folder)
    _folder(path)
    assert "a folder" in refusal(folder)
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert "special file" in refusal(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(folder: Path) -> None:
    (folder / manifest.TOKENIZER).chmod(0)
    assert "Permission denied" in refusal(folder)


def test_manifest_of_a_newer_format(folder: Path) -> None:
    path = folder / manifest.MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    assert "upgrade dovetail" in refusal(folder, trust=True)


def test_opening_loads_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys; from dovetail.runtime.artifact.opening import open_artifact; open_artifact(sys.argv[1]);"
        "print(sorted({'numpy', 'openvino', 'onnxruntime', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_artifacts_are_values(folder: Path) -> None:
    opened = open_artifact(folder)
    assert opened == open_artifact(folder)
    with pytest.raises(dataclasses.FrozenInstanceError):
        opened.digest = ""  # type: ignore[misc]  # that it fails is the point
