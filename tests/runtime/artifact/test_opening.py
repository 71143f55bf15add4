"""Proves: an artifact opens when it is exactly what its manifest says, and is refused in one line when it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from plain_artifact import write_artifact

from dovetail.runtime.artifact import manifest
from dovetail.runtime.artifact import opening as artifact_module
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import ArtifactError

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


def _link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def _link_folder(path: Path) -> None:
    path.parent.rename(path.parents[2] / "elsewhere")
    path.parent.symlink_to(path.parents[2] / "elsewhere")


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
    "link": (_link, ""),
    "folder is a link": (_link_folder, "a link"),
    "folder": (_folder, "a folder"),
    "fifo": (_fifo, "a special file"),
    "file for a folder": (_file_for_folder, "expected a folder, got a file"),
    "emptied": (lambda path: path.write_bytes(b""), "got 0"),
    "truncated": (lambda path: os.truncate(path, 1), "got 1"),
    "extended": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, got"),
    "a file besides": (lambda path: (path.parent / "more\nerror: x").write_text(""), "also"),
    "a link besides": (lambda path: (path.parent / ".more").symlink_to(path), "also"),
    "a folder besides": (lambda path: (path.parent / "more").mkdir(), "also"),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("damage", STRUCTURAL)
def test_names_kinds_and_sizes_are_checked_even_on_trust(folder: Path, damage: str, trust: bool) -> None:
    change, expected = STRUCTURAL[damage]
    change(folder / manifest.TARGET_WEIGHTS)
    assert expected in refusal(folder, trust=trust)


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
    (folder.parent / "elsewhere").write_bytes(good)
    path.symlink_to(folder.parent / "elsewhere")
    assert "a link" in refusal(folder)


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
