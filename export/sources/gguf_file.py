"""A GGUF file as a source."""

from __future__ import annotations

from pathlib import Path

from dovetail.export.sources.base import Source
from dovetail.runtime.errors import UserError


def read_gguf(path: Path) -> Source:
    """The source in the file `path`."""
    raise UserError(f"expected a checkpoint folder, got the GGUF file {path}; give the checkpoint")
