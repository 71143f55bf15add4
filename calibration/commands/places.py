"""Where a command writes what took it long to find: asked before, not after."""

from __future__ import annotations

import os
from pathlib import Path

from dovetail.runtime.errors import UserError


def need_place(option: str, path: Path | None, *, is_folder: bool = False) -> None:
    """Make the folder for `path`, or the folder `path` itself. Raises `UserError` where nothing can be written."""
    if path is None:
        return
    folder = path if is_folder else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: expected a place to write {path}, got: {error.strerror}; choose another") from None
    if not is_folder and path.is_dir():
        raise UserError(f"{option}: expected a file to write, got the folder {path}; give a name in it")
    place = path if path.exists() else folder
    if not os.access(place, os.W_OK):
        raise UserError(f"{option}: expected a place to write {path}, got one that is read-only; choose another")
