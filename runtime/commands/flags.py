"""Settings as flags of the command line, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click

from dovetail.runtime.sampling.controls import TokenBiases, TokenLists, TokenSet
from dovetail.runtime.settings import Kind, Number, Setting, Switch, Texts, Whole

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
}


def options(settings: Iterable[Setting]) -> list[Callable[[F], F]]:
    """A click option for each setting that has a flag; None or () where it is not given."""
    return [_option(one) for one in settings if one.has_flag]


def _option(about: Setting) -> Callable[[F], F]:
    words = (*about.other_flags, about.flag, about.name)
    help_text = f"{about.help}  [default: {about.default_text}]" if about.default_text else about.help
    if isinstance(about.kind, Switch):
        return click.option(*words, is_flag=True, default=None, help=help_text)
    takes, is_repeatable = _TYPES[type(about.kind)]
    return click.option(*words, type=takes, multiple=is_repeatable, help=help_text)


def given_settings(settings: Iterable[Setting], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values, by setting, of those `flags` of a command that were given."""
    values: dict[str, Any] = {}
    for one in settings:
        value = flags.get(one.name)
        if value not in (None, ()):
            values[one.name] = dict(value) if isinstance(one.kind, TokenBiases) else value
    return values
