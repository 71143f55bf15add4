"""The interpreter's standard library as text, and which of its files no model of ours was trained on.

Training, checking and measuring must agree on this split, so it lies below them all.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 40
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


def is_held_out(path: str) -> bool:
    """The split: a file is held out or not by the hash of its path, whatever else is in the corpus."""
    return path_hash(path) % HELD_OUT_ONE_IN == 0


def path_hash(path: str) -> int:
    """A number that depends on the path alone, the same on every machine."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16)


def read_text(path: Path) -> str:
    """The file as UTF-8 text; empty where it is not."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def standard_library_names() -> list[str]:
    """Paths below the standard library of its Python files, sorted, without code pages and broken test inputs."""
    root = standard_library_root()
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - _SKIPPED_FOLDERS  # not looked into: site-packages may hold any number of files
        names += [Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    skipped = ("encodings/cp", "lib2to3/tests/data")
    return sorted(name for name in names if not name.startswith(skipped) and "/bad" not in "/" + name)


def standard_library_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def held_out_files() -> Iterator[tuple[str, str]]:
    """(path, text) of the held-out files of the standard library one by one, without reading the others."""
    root = standard_library_root()
    for name in standard_library_names():
        if is_held_out(name) and (text := read_text(root / name)):
            yield name, text
