"""How an answer is made: every control of a generation, and the artifact's own defaults of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.artifact.manifest import GENERATION_CONFIG
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.errors import ArtifactError, UserError

_MAX_BYTES = 1 << 20
MAX_SEED = (1 << 64) - 1
MAX_RETURN_SEQUENCES = 1024
MAX_LOGPROBS = 100


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Names, order and results as in transformers' `generate`; the defaults switch every control off and decode
    greedily.

    Presence and frequency penalty are OpenAI's and count generated tokens only; the repetition penalty counts the
    prompt too, as in transformers. Raises `UserError` for a value out of range or of the wrong type.
    """

    max_new_tokens: int | None = None  # None: 256, or what the context leaves
    min_new_tokens: int = 0
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # token id -> added to its logit
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    eos_token_id: frozenset[int] = frozenset()  # an int or a list is taken too
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    num_return_sequences: int = 1
    seed: int = 0
    logprobs: int | None = None  # None: none; n: of each emitted token and of the n most likely ones

    def __post_init__(self) -> None:
        for name in ("stop_strings", "bad_words_ids", "eos_token_id"):
            object.__setattr__(self, name, _frozen(name, getattr(self, name)))
        for name, (low, high, open_below) in _NUMBERS.items():
            value = getattr(self, name)
            good = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
            _require(good and not (open_below and value == low), name, _range("a number", low, high, open_below), value)
        for name, (lowest, highest) in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in ("max_new_tokens", "logprobs"):
                continue
            _require(
                type(value) is int and lowest <= value <= highest, name, f"an integer from {lowest} to {highest}", value
            )
        for name in ("ignore_eos", "include_stop_str_in_output"):
            _require(type(getattr(self, name)) is bool, name, "true or false", getattr(self, name))
        self._check_tokens()
        for stop in _sequence("stop_strings", self.stop_strings):
            _require(type(stop) is str and stop != "", "stop_strings", "texts of at least one character", stop)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"expected min_new_tokens <= max_new_tokens, got {self.min_new_tokens} > {self.max_new_tokens}; fix one"
            )
        _require(not 0 < self.temperature < 1e-5, "temperature", "0 or a number from 1e-05", self.temperature)

    def _check_tokens(self) -> None:
        _require(
            isinstance(self.logit_bias, Mapping), "logit_bias", "a mapping of token ids to numbers", self.logit_bias
        )
        for token, bias in self.logit_bias.items():
            _require(_is_token(token), "logit_bias", "token ids", token)
            _require(type(bias) in (int, float) and bias < math.inf, "logit_bias", "numbers, or -inf", bias)
        for word in _sequence("bad_words_ids", self.bad_words_ids):
            ids = _sequence("bad_words_ids", word)
            _require(len(ids) > 0 and all(map(_is_token, ids)), "bad_words_ids", "lists of at least one token id", word)
        _require(isinstance(self.eos_token_id, frozenset), "eos_token_id", "an id or a list of ids", self.eos_token_id)
        _require(all(map(_is_token, self.eos_token_id)), "eos_token_id", "token ids", set(self.eos_token_id))

    def with_changes(self, **changes: Any) -> GenerationConfig:
        """A copy with some controls changed; None leaves one as it is. Raises `UserError` for an unknown name."""
        known = {field.name for field in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise UserError(f"expected controls out of {', '.join(sorted(known))}, got {unknown[0]!r}; check its name")
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})

    def check(self, vocab_size: int) -> None:
        """Raise `UserError` if controls contradict each other, or name a token that the target does not have."""
        if self.temperature == 0 and self.num_return_sequences > 1:
            raise UserError(
                f"expected a temperature above 0 for num_return_sequences {self.num_return_sequences}, got 0: "
                "greedy answers are all the same; raise the temperature"
            )
        words = [token for word in self.bad_words_ids for token in word]
        named = (("logit_bias", self.logit_bias), ("bad_words_ids", words), ("eos_token_id", self.eos_token_id))
        for name, ids in named:
            highest = max(ids, default=0)
            _require(highest < vocab_size, name, f"token ids below {vocab_size}", highest)


_NUMBERS = {  # name: lowest, highest, lowest itself excluded
    "temperature": (0, 100, False),  # and not between 0 and 1e-5, where it would overflow: see below
    "top_p": (0, 1, True),
    "min_p": (0, 1, False),
    "typical_p": (0, 1, True),
    "repetition_penalty": (0, 1e3, True),
    "presence_penalty": (-1e3, 1e3, False),
    "frequency_penalty": (-1e3, 1e3, False),
}
_INTEGERS = {
    "max_new_tokens": (1, 1 << 31),
    "min_new_tokens": (0, 1 << 31),
    "top_k": (0, 1 << 31),
    "no_repeat_ngram_size": (0, 1 << 31),
    "num_return_sequences": (1, MAX_RETURN_SEQUENCES),
    "seed": (0, MAX_SEED),
    "logprobs": (0, MAX_LOGPROBS),
}


def _range(kind: str, low: float, high: float, open_below: bool) -> str:
    return f"{kind} {'above' if open_below else 'from'} {low:g} to {high:g}"


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UserError(f"{name}: expected {expected}, got {strict_json.shown(got)}; correct it")


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _sequence(name: str, value: object) -> tuple[Any, ...]:
    _require(isinstance(value, tuple), name, "a list", value)
    assert isinstance(value, tuple)
    return value


def _frozen(name: str, value: Any) -> Any:
    """Lists as the tuples that the dataclass holds."""
    if name == "eos_token_id" and not isinstance(value, frozenset):
        try:
            return frozenset(value if isinstance(value, (list, tuple, set)) else [value])
        except TypeError:  # an unhashable id
            return value
    if name == "bad_words_ids" and isinstance(value, (list, tuple)):
        return tuple(tuple(word) if isinstance(word, list) else word for word in value)
    return tuple(value) if isinstance(value, list) else value


def load_generation_config(artifact: Artifact) -> GenerationConfig:
    """The artifact's own defaults: end-of-sequence tokens and sampling settings. Raises `ArtifactError`.

    Fields that this class lacks are ignored: published files carry many. `do_sample` false means temperature 0.
    """
    if not artifact.has(GENERATION_CONFIG):
        return GenerationConfig()
    document = strict_json.parse(artifact.file(GENERATION_CONFIG).read_bytes(), GENERATION_CONFIG, _MAX_BYTES)
    if not isinstance(document, dict):
        raise ArtifactError(f"{GENERATION_CONFIG}: expected an object, got {strict_json.shown(document)}; export again")
    eos = document.get("eos_token_id")
    names = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size")
    given = {name: document[name] for name in names if document.get(name) is not None}
    sample = document.get("do_sample")
    try:
        _require(sample is None or type(sample) is bool, "do_sample", "true or false", sample)
        given["eos_token_id"] = [] if eos is None else eos if isinstance(eos, list) else [eos]
        given["temperature"] = document.get("temperature", 1.0) if sample else 0.0
        config = GenerationConfig().with_changes(**given)
        highest = max(config.eos_token_id, default=0)
        vocab_size = artifact.manifest.target.vocab_size
        _require(highest < vocab_size, "eos_token_id", f"token ids below {vocab_size}", highest)
    except UserError as error:
        raise ArtifactError(f"{GENERATION_CONFIG} {error}; or export the artifact again") from None
    return config
