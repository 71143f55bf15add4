"""Settings as flags of the command line, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from dovetail.runtime.decoding.engine_config import Device, File, FileText, Shape, Size
from dovetail.runtime.errors import UserError
from dovetail.runtime.sampling.controls import TokenBiases, TokenLists, TokenSet
from dovetail.runtime.settings import Choice, Kind, Number, Setting, Switch, Texts, Whole

F = TypeVar("F", bound=Callable[..., Any] | click.Command)


class LogitBias(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs only
    """TOKEN=VALUE."""

    name = "token=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"expected TOKEN_ID=NUMBER, got {value!r}; for example 42=-5", param, ctx)


class TokenList(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs only
    """ID,ID,..."""

    name = "id,id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"expected token ids with commas between them, got {value!r}; for example 42,7", param, ctx)


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs only
    """A number of bytes, with a unit or without."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        if found is None:
            self.fail(f"expected a size such as 2GB or 500MB, got {value!r}", param, ctx)
        return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


# What a flag takes, and whether it may be repeated.
_TYPES: dict[type[Kind], tuple[Any, bool]] = {
    Number: (float, False),
    Whole: (int, False),
    Texts: (str, True),
    TokenBiases: (LogitBias(), True),
    TokenLists: (TokenList(), True),
    TokenSet: (int, True),
    Size: (Bytes(), False),
    Device: (str, False),
    File: (click.Path(), False),
    FileText: (click.Path(), False),
}


def options(settings: Iterable[Setting]) -> list[Callable[[F], F]]:
    """Click options for the settings that have flags, and for their shortcuts; None or () where one is not given."""
    made: list[Callable[[F], F]] = []
    for one in settings:
        if one.has_flag and isinstance(one.kind, Shape):
            made += [
                click.option(
                    f"{one.flag}-{part}",
                    type=click.IntRange(low, high),
                    help=_help(text, one.default_text),
                )
                for part, low, high, text in one.kind.parts
            ]
        elif one.has_flag:
            made.append(_option(one))
        made += [click.option(flag, is_flag=True, help=text) for flag, (_, text) in one.shortcuts.items()]
    return made


def _option(about: Setting) -> Callable[[F], F]:
    words, text = (*about.other_flags, about.flag, about.name), _help(about.help, about.default_text)
    if isinstance(about.kind, Switch):
        names = f"{about.flag}/--no-{about.flag[2:]}" if about.default else about.flag  # one that is on can be put off
        return click.option(*about.other_flags, names, about.name, is_flag=True, default=None, help=text)
    if isinstance(about.kind, Choice):
        return click.option(*words, type=click.Choice(about.kind.names), help=text)
    takes, is_repeatable = _TYPES[type(about.kind)]
    return click.option(*words, type=takes, multiple=is_repeatable, help=text)


def _help(text: str, default: str) -> str:
    return f"{text}  [default: {default}]" if default else text


def given_settings(settings: Iterable[Setting], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values, by setting, of those `flags` of a command that were given. Of a `Shape` the given parts only, as a
    dictionary: the artifact has the rest. A shortcut wins over the flag that it is short for. Raises `UserError` for a
    file that can't be read.
    """
    values: dict[str, Any] = {}
    for one in settings:
        value = flags.get(one.name)
        if isinstance(one.kind, Shape):
            parts = {part: flags.get(f"{one.name}_{part}") for part, *_ in one.kind.parts}
            value = {part: size for part, size in parts.items() if size is not None} or None
        for flag, (meant, _) in one.shortcuts.items():
            value = meant if flags.get(flag[2:].replace("-", "_")) else value
        if value not in (None, ()):
            values[one.name] = _from_flag(one, value)
    return values


def _from_flag(about: Setting, value: Any) -> Any:
    if isinstance(about.kind, TokenBiases):
        return dict(value)
    if isinstance(about.kind, FileText):
        try:
            return Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{about.flag} {value}: expected a readable text file, got {error}; check the path"
            ) from None
    return value
