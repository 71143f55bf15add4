"""What a control is: a setting of `GenerationConfig`, and what it means for greedy decoding."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from dovetail.runtime.settings import Kind, Refusal, Setting, declared, plain

T = TypeVar("T")
_TOKEN = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Control(Setting):
    """A setting of how an answer is made.

    `needs_scores` says that greedy decoding with it has to look at the processed scores. Without, the next token is
    the best of the raw logits, which is much cheaper: False is a promise that the control never makes another token
    the best one, and reports nothing of the others. tests/runtime/sampling/test_controls.py holds every control to it.
    """

    as_in: str  # whose parameter of this name it is
    needs_scores: bool
    until_position: bool = False  # it acts only at output positions below its value
    of_artifact: bool = False  # the artifact's generation_config.json may give a default


def control(default: T, kind: Kind, *, help: str, as_in: str, needs_scores: bool, **more: Any) -> T:
    """The declaration of a field of `GenerationConfig`; `more` are further fields of `Control`."""
    if more.get("of_artifact"):
        more["shown_default"] = more.get("shown_default", "the artifact's")
    about = Control(kind=kind, default=default, help=help, as_in=as_in, needs_scores=needs_scores, **more)
    return cast(T, declared(about))


def argmax_from(controls: Iterable[Control], config: Any) -> float:
    """The output position from which on the next token of `config` is the best of the raw logits: 0 for plain greedy
    decoding, infinity for one that needs the scores to the end.
    """
    start = 0.0
    for one in controls:
        value = getattr(config, one.name)
        if one.needs_scores and value != one.default:
            start = max(start, value if one.until_position else math.inf)
    return start


def is_token(value: object) -> bool:
    """Whether it can be a token's id."""
    return type(value) is int and 0 <= value < 1 << 31


def biases_from_json(document: Mapping[str, Any]) -> dict[int | str, Any]:
    """Token id -> bias: JSON has no integer keys. A key that is no id, or an id spelled otherwise, stays a text, and
    texts are refused.
    """
    return {int(token) if _TOKEN.fullmatch(token) else token: bias for token, bias in document.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class TokenBiases:
    """Token id -> what is added to its logit."""

    def frozen(self, value: Any) -> Any:
        """As it is, but for numpy's numbers."""
        if isinstance(value, Mapping):
            return {plain(token): plain(bias) for token, bias in value.items()}
        return value

    def refusal(self, value: Any) -> Refusal | None:
        """See `Kind`."""
        if not isinstance(value, Mapping):
            return "a mapping of token ids to numbers", value
        for token, bias in value.items():
            if not is_token(token):
                return "token ids", token
            if not (type(bias) in (int, float) and bias < math.inf):
                return "numbers, or -inf", bias
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLists:
    """Lists of token ids."""

    def frozen(self, value: Any) -> Any:
        """Lists as tuples."""
        value = plain(value)
        if isinstance(value, (list, tuple)):
            words = [plain(word) for word in value]
            return tuple(tuple(map(plain, word)) if isinstance(word, (list, tuple)) else word for word in words)
        return value

    def refusal(self, value: Any) -> Refusal | None:
        """See `Kind`."""
        if not isinstance(value, tuple):
            return "a list", value
        for word in value:
            if not isinstance(word, tuple):
                return "a list", word
            if not word or not all(map(is_token, word)):
                return "lists of at least one token id", word
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSet:
    """Token ids; a single one is taken too."""

    def frozen(self, value: Any) -> Any:
        """As a frozenset."""
        value = plain(value)
        try:
            return frozenset(map(plain, value if isinstance(value, (list, tuple, set, frozenset)) else [value]))
        except TypeError:  # an unhashable id
            return value

    def refusal(self, value: Any) -> Refusal | None:
        """See `Kind`."""
        if not isinstance(value, frozenset):
            return "an id or a list of ids", value
        return None if all(map(is_token, value)) else ("token ids", set(value))
