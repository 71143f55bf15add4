"""How an answer is made: every control of a generation, and the artifact's own defaults of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.sampling.controls import Control, TokenBiases, TokenLists, TokenSet, control
from dovetail.runtime.settings import Number, Switch, Texts, Whole, check_names, check_settings, settings_of

if TYPE_CHECKING:
    from dovetail.runtime.artifact.opening import Artifact

_MAX_BYTES = 1 << 20
_MAX_COUNT = 1 << 31
ALL_THAT_IS_LEFT = -1
"""As `max_new_tokens`: up to the end of the context."""
_LEAST_TEMPERATURE = 1e-5  # above 0: below it, scores would overflow


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Names, order and results as in transformers' `generate`; the defaults switch every control off and decode
    greedily.

    Presence and frequency penalty are OpenAI's and count generated tokens only; the repetition penalty counts the
    prompt too, as in transformers. Raises `UserError` for a value out of range or of the wrong type.

    A new control is a field here, and where it changes scores a step in `processors.py`.
    """

    max_new_tokens: int | None = control(
        None,
        Whole(1, _MAX_COUNT, besides=ALL_THAT_IS_LEFT),
        help="Tokens to generate; -1: to the end of the context.",
        as_in="transformers",
        needs_scores=False,
        other_flags=("-n",),
        other_names=("max_tokens", "max_completion_tokens", "n_predict", "num_predict", "max_gen_len"),
        shown_default="the artifact's, or 256",
        of_artifact=True,
    )
    max_length: int | None = control(
        None,
        Whole(1, _MAX_COUNT),
        help="Tokens of prompt and answer, without max_new_tokens.",
        as_in="transformers",
        needs_scores=False,
        of_artifact=True,
    )
    min_new_tokens: int = control(
        0,
        Whole(0, _MAX_COUNT),
        help="No end-of-sequence token before these.",
        as_in="transformers",
        needs_scores=True,
        until_position=True,
        other_names=("min_tokens",),
        of_artifact=True,
    )
    min_length: int = control(
        0,
        Whole(0, _MAX_COUNT),
        help="The same, the prompt's tokens counted.",
        as_in="transformers",
        needs_scores=True,
        until_position=True,
        of_artifact=True,
    )
    temperature: float = control(
        0.0,
        Number(0, 100),
        help="0 decodes greedily.",
        as_in="transformers",
        needs_scores=True,
        other_names=("do_sample", "temp"),
        of_artifact=True,
    )
    top_k: int = control(
        0,
        Whole(0, _MAX_COUNT),
        help="Keep the K most likely tokens; 0 keeps all.",
        as_in="transformers",
        needs_scores=False,
        of_artifact=True,
    )
    top_p: float = control(
        1.0,
        Number(0, 1, above=True),
        help="Keep the smallest set of tokens of this probability.",
        as_in="transformers",
        needs_scores=False,
        of_artifact=True,
    )
    min_p: float = control(
        0.0,
        Number(0, 1),
        help="Drop tokens below this share of the best one's probability.",
        as_in="transformers",
        needs_scores=False,
        of_artifact=True,
    )
    typical_p: float = control(
        1.0,
        Number(0, 1, above=True),
        help="Keep the typical tokens of this probability.",
        as_in="transformers",
        needs_scores=False,
        of_artifact=True,
    )
    repetition_penalty: float = control(
        1.0,
        Number(0, 1e3, above=True),
        help="Above 1: tokens of the text become less likely.",
        as_in="transformers",
        needs_scores=True,
        other_names=("repeat_penalty",),
        of_artifact=True,
    )
    presence_penalty: float = control(
        0.0,
        Number(-1e3, 1e3),
        help="Subtracted from logits of generated tokens.",
        as_in="OpenAI",
        needs_scores=True,
    )
    frequency_penalty: float = control(
        0.0,
        Number(-1e3, 1e3),
        help="The same, times their count.",
        as_in="OpenAI",
        needs_scores=True,
    )
    logit_bias: Mapping[int, float] = control(
        {},
        TokenBiases(),
        help="Add to a token's logit; repeatable.",
        as_in="OpenAI",
        needs_scores=True,
    )
    no_repeat_ngram_size: int = control(
        0,
        Whole(0, _MAX_COUNT),
        help="No N tokens in a row occur twice; 0 is off.",
        as_in="transformers",
        needs_scores=True,
        of_artifact=True,
    )
    bad_words_ids: tuple[tuple[int, ...], ...] = control(
        (),
        TokenLists(),
        help="Never these tokens in a row; repeatable.",
        as_in="transformers",
        needs_scores=True,
        other_names=("bad_words",),
        of_artifact=True,
    )
    suppress_tokens: frozenset[int] = control(
        frozenset(),
        TokenSet(),
        help="Never this token; repeatable.",
        as_in="transformers",
        needs_scores=True,
        of_artifact=True,
    )
    eos_token_id: frozenset[int] = control(
        frozenset(),
        TokenSet(),
        help="Token that ends the answer; repeatable.",
        as_in="transformers",
        needs_scores=False,
        other_names=("stop_token_ids", "stop_token_id", "eos_token"),
        of_artifact=True,
    )
    ignore_eos: bool = control(
        False,
        Switch(),
        help="Go on behind the end-of-sequence token.",
        as_in="vLLM",
        needs_scores=False,
    )
    stop_strings: tuple[str, ...] = control(
        (),
        Texts(),
        help="End the answer at this text; repeatable.",
        as_in="transformers",
        needs_scores=False,
        other_flags=("--stop",),
        other_names=("stop", "stop_sequences", "stop_words"),
        of_artifact=True,
    )
    include_stop_str_in_output: bool = control(
        False,
        Switch(),
        help="Show the stop text too.",
        as_in="OpenVINO GenAI",
        needs_scores=False,
    )
    skip_special_tokens: bool = control(
        True,
        Switch(),
        help="Leave special tokens out of the text.",
        as_in="transformers",
        needs_scores=False,
        shown_default="on",
    )
    num_return_sequences: int = control(
        1,
        Whole(1, 1024),
        help="How many answers.",
        as_in="transformers",
        needs_scores=False,
        other_names=("n", "best_of", "num_samples"),
    )
    seed: int = control(
        0,
        Whole(0, (1 << 64) - 1),
        help="Same seed, same text.",
        as_in="OpenAI",
        needs_scores=False,
        other_names=("random_seed", "rng_seed", "manual_seed"),
        shown_default="random on the command line, 0 in Python",
    )
    logprobs: int | None = control(
        None,
        Whole(0, 100),
        help="Report log-probabilities: each token's and the N best.",
        as_in="vLLM",
        needs_scores=True,
        other_names=("top_logprobs", "output_scores"),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.max_new_tokens not in (None, ALL_THAT_IS_LEFT) and self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"expected min_new_tokens <= max_new_tokens, got {self.min_new_tokens} > {self.max_new_tokens}; fix one"
            )
        _require(
            not 0 < self.temperature < _LEAST_TEMPERATURE,
            "temperature",
            f"0 or a number from {_LEAST_TEMPERATURE:g}",
            self.temperature,
        )

    def with_changes(self, **changes: Any) -> GenerationConfig:
        """A copy with some controls changed; None leaves one as it is. Raises `UserError` for an unknown name."""
        check_names(GenerationConfig, changes, "controls")
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})

    def check(self, vocab_size: int) -> None:
        """Raise `UserError` if controls contradict each other, or name a token that the target does not have."""
        if self.temperature == 0 and self.num_return_sequences > 1:
            raise UserError(
                f"expected a temperature above 0 for num_return_sequences {self.num_return_sequences}, got 0: "
                "greedy answers are all the same; raise the temperature"
            )
        words = [token for word in self.bad_words_ids for token in word]
        named: tuple[tuple[str, Iterable[int]], ...] = (
            ("logit_bias", self.logit_bias),
            ("bad_words_ids", words),
            ("suppress_tokens", self.suppress_tokens),
            ("eos_token_id", self.eos_token_id),
        )
        for name, ids in named:
            highest = max(ids, default=0)
            _require(highest < vocab_size, name, f"token ids below {vocab_size}", highest)


CONTROLS = cast(Mapping[str, Control], settings_of(GenerationConfig))
"""The registry of controls by name: flags, checks, README's table and the argmax shortcut come from it."""


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UserError(f"{name}: expected {expected}, got {strict_json.shown(got)}; correct it")


def load_generation_config(artifact: Artifact) -> GenerationConfig:
    """The artifact's own defaults: see `read_generation_config`. Raises `ArtifactError`."""
    from dovetail.runtime.artifact.manifest import GENERATION_CONFIG

    if not artifact.has(GENERATION_CONFIG):
        return GenerationConfig()
    document = strict_json.parse(artifact.file(GENERATION_CONFIG).read_bytes(), GENERATION_CONFIG, _MAX_BYTES)
    try:
        return read_generation_config(document, artifact.manifest.target.vocab_size)
    except UserError as error:
        raise ArtifactError(f"{GENERATION_CONFIG} {error}; or export the artifact again") from None


def read_generation_config(document: object, vocab_size: int) -> GenerationConfig:
    """What the document of a `generation_config.json` says for a target of `vocab_size` tokens. An export asks it, too,
    before an artifact appears.

    Published files carry many fields; those that are no control of `of_artifact` are ignored, and null is as good as
    absent. As in transformers, `do_sample` decides: without it the temperature is 0, with it 1 unless one is given.
    `top_k` of 0 or less keeps all tokens, as elsewhere; `top_p` 0 keeps the best one, so it is temperature 0. Raises
    `UserError` that names the field.
    """
    if not isinstance(document, dict):
        raise UserError(f"expected an object, got {strict_json.shown(document)}; correct it")
    given = {
        name: document[name] for name, one in CONTROLS.items() if one.of_artifact and document.get(name) is not None
    }
    sample, top_k, top_p = document.get("do_sample"), given.get("top_k"), given.get("top_p")
    _require(sample is None or type(sample) is bool, "do_sample", "true or false", sample)
    given["temperature"] = given.get("temperature", 1.0) if sample else 0.0
    if type(top_k) is int and top_k < 0:
        given["top_k"] = 0
    if type(top_p) in (int, float) and top_p == 0:
        given |= {"top_p": 1.0, "temperature": 0.0}
    config = GenerationConfig().with_changes(**given)
    config.check(vocab_size)
    return config
