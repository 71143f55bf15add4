"""What a user's SRC names -> its source."""

from __future__ import annotations

import re
from pathlib import Path

from dovetail.export.sources.base import Source
from dovetail.export.sources.hub import download
from dovetail.export.sources.ir_folder import IR_MODEL, read_ir_folder
from dovetail.runtime.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*\Z")


def find_source(name: str | Path, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """The source `name`: a folder, a GGUF file, or else an id `organisation/model` that is fetched from the hub at
    `revision` (a branch, tag or commit).

    Raises `UserError` when there is no such thing, or when it can't be exported.
    """
    path = Path(name)
    if path.is_dir() or path.is_file():
        if revision is not None:
            raise UserError(f"expected `revision` with a hub id, got {path}; drop one of them")
    elif isinstance(name, str) and _HUB_ID.match(name):
        path = download(name, revision, allow_pickle)
    if path.is_file() and path.suffix == ".gguf":
        from dovetail.export.sources.gguf_file import read_gguf

        return read_gguf(path)
    if not path.is_dir():
        raise UserError(
            f"expected a checkpoint folder, a .gguf file, an IR folder or a hub id (organisation/model), got {name}, "
            f"which is none; check the path"
        )
    if (path / IR_MODEL).is_file():
        return read_ir_folder(path, allow_pickle)
    from dovetail.export.sources.checkpoint import read_checkpoint

    return read_checkpoint(path, allow_pickle)
