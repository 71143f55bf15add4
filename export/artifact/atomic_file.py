"""A file that appears whole or not at all: written beside its goal, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden neighbour to write, which takes the name `path` when the block ends well and is removed when it does
    not: a kill leaves the old file or the new one. What a killed run left of it is overwritten by the next.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it is gone, or the disk has another error to tell
            beside.unlink()
