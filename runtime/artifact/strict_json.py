"""Strict JSON for files that nobody vouches for: plain UTF-8, no duplicate keys, no NaN, bounded numbers and size; and
writing one whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import math
import os
import reprlib
import threading
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dovetail.runtime.errors import ArtifactError

T = TypeVar("T")
Refuse = Callable[[str, object], NoReturn]
"""Raises the caller's error from what was expected and what was found."""

_MAX_DIGITS = 19  # enough for 64 bits; a longer integer is an attack on the reader, not a size
_MAX_DEPTH = 100  # real ones: 20, where tools describe their arguments

_TEMPORARY = ".writing"
_OLD_S = 3600  # nobody takes that long to write

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 60
_shorten.maxlevel = 2


def shown(value: object) -> str:
    """`value` for an error message: one line, at most 80 characters, never failing on deep or huge values."""
    return _shorten.repr(value)[:80]


def printable(text: str) -> str:
    """`text` of a stranger for a person's terminal: U+FFFD for line ends, control characters, marks that turn the
    direction of writing, and halves of characters.
    """
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def parse(data: bytes, what: str, max_bytes: int, remedy: str = "export the artifact again") -> Any:
    """The document in `data`. Raises `ArtifactError` that calls the file `what` and ends in `remedy`."""
    if len(data) > max_bytes:
        raise ArtifactError(f"{what}: expected at most {max_bytes} bytes, got {len(data)}; {remedy}")
    try:
        text = data.decode("utf-8")
        document = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
        check_depth(document)
        return document
    except (ValueError, RecursionError) as error:
        reason = "nesting too deep" if isinstance(error, RecursionError) else str(error)[:160]
        raise ArtifactError(f"{what}: expected one strict JSON document, got {reason}; {remedy}") from None


def check_depth(document: Any) -> None:
    """Raise `RecursionError` for a document that is nested deeper than what reads, shows or writes it can recurse."""
    level = [document] if type(document) in (dict, list) else []
    for _ in range(_MAX_DEPTH):
        values = (value for one in level for value in (one.values() if type(one) is dict else one))
        level = [value for value in values if type(value) in (dict, list)]
    if level:
        raise RecursionError


def write(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename: a reader sees the old file or the new one, even if the power fails. What a
    killed process left beside it, a later one removes. Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    # A name that is known before the file is there: an interrupt at any moment leaves nothing behind.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{_TEMPORARY}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _remove_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{_TEMPORARY}"):
        with contextlib.suppress(OSError):  # another process was quicker
            if leftover.stat().st_mtime < time.time() - _OLD_S:
                leftover.unlink()


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


def decode(cls: type[T], value: Any, where: str, refuse: Refuse) -> T:
    """`value` as the dataclass `cls`: every field there, none besides, each of its annotated type. A field with a
    default may be missing: it is younger than some files of the format.

    Types may be plain ones, other dataclasses, `dict[str, X]`, `tuple[X, ...]` and `X | None`. What the dataclass
    itself raises passes through.
    """
    assert dataclasses.is_dataclass(cls)
    if not isinstance(value, dict):
        refuse(f"{where} as an object", value)
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    if not needed <= set(value) <= names:
        refuse(
            f"{where} with the fields {', '.join(sorted(names))}", sorted((needed - set(value)) | (set(value) - names))
        )
    return cls(**{name: _typed(hints[name], value[name], f"{where}.{name}", refuse) for name in value})


def _typed(hint: Any, value: Any, where: str, refuse: Refuse) -> Any:
    if isinstance(hint, types.UnionType):
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        return None if value is None else _typed(inner[0], value, where, refuse)
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value, where, refuse)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            refuse(f"{where} as an object", value)
        item = typing.get_args(hint)[1]
        return {key: _typed(item, entry, f"{where}[{shown(key)}]", refuse) for key, entry in value.items()}
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            refuse(f"{where} as a list", value)
        item = typing.get_args(hint)[0]
        return tuple(_typed(item, entry, f"{where}[{index}]", refuse) for index, entry in enumerate(value))
    if hint is float:
        if type(value) not in (int, float):
            refuse(f"{where} as a number", value)
        return float(value)
    if type(value) is not hint:
        refuse(f"{where} as {hint.__name__}", value)
    return value
