"""Strict JSON for files that nobody vouches for: plain UTF-8, no duplicate keys, no NaN, bounded numbers and size."""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any

from dovetail.runtime.errors import ArtifactError

_MAX_DIGITS = 19  # enough for 64 bits; a longer integer is an attack on the reader, not a size

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 60
_shorten.maxlevel = 2


def shown(value: object) -> str:
    """`value` for an error message: one line, at most 80 characters, never failing on deep or huge values."""
    return _shorten.repr(value)[:80]


def parse(data: bytes, what: str, max_bytes: int) -> Any:
    """The document in `data`. Raises `ArtifactError` that calls the file `what`."""
    if len(data) > max_bytes:
        raise ArtifactError(f"{what}: expected at most {max_bytes} bytes, got {len(data)}; export the artifact again")
    try:
        text = data.decode("utf-8")
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        reason = "nesting too deep" if isinstance(error, RecursionError) else str(error)[:160]
        raise ArtifactError(
            f"{what}: expected one strict JSON document, got {reason}; export the artifact again"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"the number {name}")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS + 1:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]}")
    return value
