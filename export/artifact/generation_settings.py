"""generation_config.json as the runtime takes it: what transformers overlooks is mended and said, the rest refused."""

from __future__ import annotations

import logging
from typing import Any

from dovetail.export.sources.base import Source
from dovetail.runtime.errors import UserError
from dovetail.runtime.sampling.config import read_generation_config

_log = logging.getLogger(__name__)


def usable_generation_config(source: Source) -> dict[str, Any]:
    """The source's settings, without end tokens that its vocabulary lacks (-1 stands for none in some files), whole
    numbers as such.

    Raises `UserError` for what the runtime would refuse when the artifact is opened.
    """
    settings = {
        name: int(value) if isinstance(value, float) and value.is_integer() and name.startswith("top_k") else value
        for name, value in source.generation_config.items()
    }
    vocab_size = source.config.get("vocab_size")
    if type(vocab_size) is not int:  # of an IR, whose config may lack it
        return settings
    ends = settings.get("eos_token_id")
    if ends is not None:
        ids = ends if isinstance(ends, list) else [ends]
        kept = [token for token in ids if type(token) is int and 0 <= token < vocab_size]
        if len(kept) < len(ids) and all(type(token) is int for token in ids):
            odd = [token for token in ids if token not in kept]
            _log.warning(f"generation_config.json: no token ends a text by the id {odd[0]}, which no token has")
            settings["eos_token_id"] = kept or None
    try:
        read_generation_config(settings, vocab_size)
    except UserError as error:
        raise UserError(f"generation_config.json of {source.path}: {error}") from None
    return settings
