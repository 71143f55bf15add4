"""Settings: the fields of a configuration, each declared once with all that is known of it.

The field's declaration carries its range, its default, its help and its flag. Checks, the command line's flags and
README's tables are made from that, so nothing can be forgotten in one of them.

>>> @dataclasses.dataclass(frozen=True, slots=True)
... class Oven:
...     degrees: int = setting(180, Whole(0, 300), help="How hot it gets.")
...
...     def __post_init__(self) -> None:
...         check_settings(self)
>>> settings_of(Oven)["degrees"].flag
'--degrees'
>>> Oven(degrees=900)
Traceback (most recent call last):
dovetail.runtime.errors.UserError: degrees: expected an integer from 0 to 300, got 900; correct it
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

from dovetail.runtime.artifact.strict_json import shown
from dovetail.runtime.errors import UserError

T = TypeVar("T")
Refusal = tuple[str, object]
"""What was expected, and what was found instead."""


class Kind(Protocol):
    """The values that a setting can have."""

    def frozen(self, value: Any) -> Any:
        """`value` as the configuration holds it: lists become tuples."""
        ...

    def refusal(self, value: Any) -> Refusal | None:
        """Why the frozen `value` is none of these; None if it is one."""
        ...


def plain(value: Any) -> Any:
    """`value` without numpy, which is not imported for it: its numbers and arrays become Python's numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


@dataclasses.dataclass(frozen=True, slots=True)
class _Plain:
    """A kind whose values need no freezing."""

    def frozen(self, value: Any) -> Any:
        """As it is, but for numpy's numbers."""
        return plain(value)


@dataclasses.dataclass(frozen=True, slots=True)
class Number(_Plain):
    """A finite number from `low` to `high`; `above`: without `low` itself."""

    low: float
    high: float
    above: bool = False

    def refusal(self, value: Any) -> Refusal | None:
        """See `Kind`."""
        is_number = type(value) in (int, float) and math.isfinite(value)
        if is_number and self.low <= value <= self.high and not (self.above and value == self.low):
            return None
        return f"a number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}", value


@dataclasses.dataclass(frozen=True, slots=True)
class Whole(_Plain):
    """An integer from `low` to `high`, or the one `besides`."""

    low: int
    high: int
    besides: int | None = None

    def refusal(self, value: Any) -> Refusal | None:
        """See `Kind`."""
        if type(value) is int and (self.low <= value <= self.high or value == self.besides):
            return None
        more = "" if self.besides is None else f", or {self.besides}"
        return f"an integer from {self.low} to {self.high}{more}", value


@dataclasses.dataclass(frozen=True, slots=True)
class Switch(_Plain):
    """True or false."""

    def refusal(self, value: Any) -> Refusal | None:
        """See `Kind`."""
        return None if type(value) is bool else ("true or false", value)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice(_Plain):
    """One of some names."""

    names: tuple[str, ...]

    def refusal(self, value: Any) -> Refusal | None:
        """See `Kind`."""
        return None if value in self.names else (" or ".join(self.names), value)


@dataclasses.dataclass(frozen=True, slots=True)
class Texts:
    """Texts that are not empty."""

    def frozen(self, value: Any) -> Any:
        """A list as a tuple; one text as a tuple of it."""
        value = (value,) if isinstance(value, str) else plain(value)
        return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value

    def refusal(self, value: Any) -> Refusal | None:
        """See `Kind`."""
        if not isinstance(value, tuple):
            return "a text or a list of them", value
        wrong = [text for text in value if type(text) is not str or text == ""]
        return ("texts of at least one character", wrong[0]) if wrong else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field of a configuration."""

    name: str = ""  # the field's; `settings_of` fills it in
    kind: Kind
    default: Any
    help: str  # one sentence or two, for --help and README
    shown_default: str | None = None  # where the bare value says too little
    other_flags: tuple[str, ...] = ()  # short forms and synonyms of the flag
    other_names: tuple[str, ...] = ()  # that other programs have for it; they are not taken, but answered
    has_flag: bool = True  # False: for Python alone, or by `shortcuts` only
    shortcuts: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)  # flag -> (value, help)

    @property
    def flag(self) -> str:
        """On the command line: the name with dashes."""
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default in words; empty where the setting is simply off."""
        if self.shown_default is not None:
            return self.shown_default
        is_said = isinstance(self.default, (int, float, str)) and type(self.default) is not bool
        return (f"{self.default:g}" if isinstance(self.default, float) else str(self.default)) if is_said else ""

    def frozen(self, value: Any) -> Any:
        """`value` as the configuration holds it; None is only taken where it is the default. Raises `UserError`."""
        if value is None and self.default is None:
            return None
        value = self.kind.frozen(value)
        refusal = self.kind.refusal(value)
        if refusal is not None:
            raise UserError(f"{self.name}: expected {refusal[0]}, got {shown(refusal[1])}; correct it")
        return value


def setting(default: T, kind: Kind, *, help: str, **more: Any) -> T:
    """The declaration of a dataclass' field; `more` are further fields of `Setting`. The type that it claims to
    return is the field's, as with `dataclasses.field`.
    """
    return cast(T, declared(Setting(kind=kind, default=default, help=help, **more)))


def declared(about: Setting) -> Any:
    """A dataclass' field with its setting."""
    metadata = {"setting": about}
    if about.default.__hash__ is None:  # a dictionary: every configuration gets its own
        return dataclasses.field(default_factory=lambda: type(about.default)(about.default), metadata=metadata)
    return dataclasses.field(default=about.default, metadata=metadata)


@functools.cache
def settings_of(configuration: type) -> Mapping[str, Setting]:
    """The settings of a configuration's class by name, in the order of its fields."""
    fields = dataclasses.fields(configuration)
    return {field.name: dataclasses.replace(field.metadata["setting"], name=field.name) for field in fields}


def check_settings(configuration: Any) -> None:
    """Freeze and check every field, for a `__post_init__`. Raises `UserError` with the first that is wrong."""
    kind: Any = type(configuration)
    for about in settings_of(kind).values():
        object.__setattr__(configuration, about.name, about.frozen(getattr(configuration, about.name)))


def check_names(configuration: type, given: Mapping[str, Any], what: str) -> None:
    """Raise `UserError` unless all names in `given` are settings; `what` they are called."""
    known = settings_of(configuration)
    for name in given:
        if name not in known:
            raise UserError(unknown_name(name, known, what))


def unknown_name(name: str, known: Mapping[str, Setting], what: str) -> str:
    """What to say of a name that is none of the `known` settings, `what` they are called: the one that is meant, as far
    as that can be told, or else all of them.
    """
    meant = [about for about in known.values() if name in about.other_names]
    meant += [known[close] for close in difflib.get_close_matches(name, known, n=1)]
    if meant:
        return f"expected {what}, got {name!r:.60}; use {meant[0].name} ({meant[0].help.rstrip('.')})"
    return f"expected {what} out of {', '.join(sorted(known))}, got {name!r:.60}; check its name"
