"""Drawing the target's next token: the processors on one row of logits, then a race between the tokens.

Token v at output position i arrives after a time drawn from (seed, i, v) alone, divided by v's probability; the first
to arrive is drawn. With exponential times that is a fair draw (the Gumbel-max trick, Maddison et al. 2014, arXiv
1411.0030, section 2), and rounding matters only where the two first arrive together: so with `exact` numerics the same
seed gives the same tokens with any draft, any tree, or none. The earliest time of all is known (`PositionTimes`), and
for tokens that could not win even with that nothing more is computed.

The times are known before the target's probabilities are. So a draft that is right about the probabilities is right
about the draw, too: `foresee` lets its candidates run the same race (coupling without communication, Daliri et al.
2024, arXiv 2408.07978).

Letters: V vocabulary, R rows of candidates, K candidates in a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dovetail.runtime.errors import NothingAllowedError, TargetError
from dovetail.runtime.sampling import processors
from dovetail.runtime.sampling.config import CONTROLS, GenerationConfig
from dovetail.runtime.sampling.controls import argmax_from
from dovetail.runtime.sampling.random_times import PositionTimes, RandomTimes
from dovetail.runtime.trees.tree import Float32s, Integers

_IMPOSSIBLE = -1e3  # nats: a score that can still be added up
_COLUMN = 64  # tokens
_ROUNDING = 1e-9  # relative; far above that of any score


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities after processing: of the drawn token, and of the most likely ones."""

    logprob: float
    top: list[tuple[int, float]]  # token, logprob; best first


class Sampler:
    """Draws the tokens of one text, in order. Every draw is emitted, so the sampler's text is the text."""

    def __init__(self, config: GenerationConfig, prompt: Sequence[int], vocab_size: int, sequence: int = 0) -> None:
        """`sequence` numbers the texts of one request; each has random numbers of its own."""
        changes = {name: value for name, one in CONTROLS.items() if (value := getattr(config, name)) != one.default}
        self._config = config
        self._logit_steps = processors.steps(processors.LOGIT_STEPS, changes)
        self._shape_steps = processors.steps(processors.SHAPE_STEPS, changes)
        self._argmax_from = argmax_from(CONTROLS.values(), config)
        seen = np.zeros(vocab_size, np.bool_)
        seen[list(prompt)] = True
        counts = np.zeros(vocab_size, np.int64)
        self._text = processors.TextSoFar(list(prompt), len(prompt), seen, counts, config.eos_token_id)
        # How many of the best tokens the shape steps have to see to judge one of them: shares of the whole need all.
        needs_shares = config.top_p < 1 or config.typical_p < 1
        self._seen_best = (config.top_k or vocab_size) if needs_shares else 0
        self._times = RandomTimes(config.seed + (sequence << 64), vocab_size)
        self.logprobs: list[TokenLogprobs] = []  # one per draw, if the config asks for them

    def draw(self, logits: Float32s) -> int:
        """The token at the next output position from the target's row `logits` [V]."""
        if not np.isfinite(logits.max()):  # NaN anywhere is the maximum
            raise TargetError(
                f"expected finite logits at output position {self._position}, got NaN or infinity from the target; "
                "the weights are damaged or overflow, export the artifact again"
            )
        if self._position >= self._argmax_from:
            token = int(logits.argmax())
        else:
            scores = self._adjusted(logits)
            token = self._first_to_arrive(scores) if self._config.temperature > 0 else int(scores.argmax())
            if self._config.logprobs is not None:
                self.logprobs.append(_logprobs(self._final(scores), token, self._config.logprobs))
        self.follow(token)
        return token

    def follow(self, token: int) -> None:
        """The text goes on with `token`."""
        self._text.append(token)

    def rewind(self, count: int) -> None:
        """Take draws back until `count` are left."""
        self._text.cut(count)
        del self.logprobs[count:]

    def foresee(self, paths: Sequence[Sequence[int]], tokens: Integers, log_probs: Float32s) -> Float32s:
        """What a draft may know of the draws behind `paths` [R], tokens that may come next, all equally many: its
        candidates `tokens` [R, K] with `log_probs` [R, K] become those that arrive first. Log-probabilities [R, K]
        within the row; of greedy decoding, which leaves nothing to chance, the draft's own.
        """
        if self._config.temperature == 0:
            return log_probs
        times = self._times.at(self._position + len(paths[0])).of(tokens)
        # What top-k, top-p and the like keep the target from drawing may not win here; nearly, with K candidates of V.
        with np.errstate(invalid="ignore"):  # what is no number stays none, and the draft is given up for it
            scores = np.stack([self._shaped(row) for row in log_probs.astype(np.float64)])
            arrivals = scores - np.log(times)
            arrivals -= arrivals.max(axis=1, keepdims=True)
            arrivals -= np.log(np.exp(arrivals).sum(axis=1, keepdims=True))
            return np.maximum(arrivals, _IMPOSSIBLE).astype(np.float32)

    def processed(self, logits: Float32s) -> processors.Scores:
        """[V] scores after every control, in transformers' order; minus infinity cannot be drawn."""
        return self._final(self._adjusted(logits))

    def _final(self, adjusted: Float32s | processors.Scores) -> processors.Scores:
        """[V] what the steps of sampling make of `adjusted`, which stay as they are."""
        scores = adjusted.astype(np.float64)
        return self._shaped(scores) if self._config.temperature > 0 else scores

    def _adjusted(self, logits: Float32s) -> Float32s | processors.Scores:
        """[V] scores after the steps that greedy decoding has, too; without any, `logits` themselves."""
        if not self._logit_steps:
            return logits
        scores = logits.astype(np.float64)
        for step, value in self._logit_steps:
            scores = step(scores, value, self._text)
        if scores.max() == -np.inf:
            raise NothingAllowedError(
                f"expected at least one token that may follow at output position {self._position}, got none: bans and "
                "biases exclude the whole vocabulary; relax no_repeat_ngram_size, bad_words_ids, suppress_tokens or "
                "logit_bias"
            )
        return scores

    def _shaped(self, scores: processors.Scores) -> processors.Scores:
        for step, value in self._shape_steps:
            scores = step(scores, value, self._text)
        return scores

    @property
    def _position(self) -> int:
        return self._text.position

    def _first_to_arrive(self, scores: Float32s | processors.Scores) -> int:
        """The drawn token, as if all V ran: who can't win is left out before anything is computed for it."""
        times = self._times.at(self._position)
        if self._seen_best < len(scores):
            tokens = _contenders(scores, times, self._config.temperature, self._seen_best)
            shaped = self._shaped(scores[tokens].astype(np.float64))
        else:
            shaped = self._shaped(scores.astype(np.float64))
            tokens = _contenders(shaped, times)
            shaped = shaped[tokens]
        return int(tokens[(shaped - np.log(times.of(tokens))).argmax()])


def _contenders(
    scores: Float32s | processors.Scores, times: PositionTimes, temperature: float = 1.0, best: int = 0
) -> npt.NDArray[np.intp]:
    """The tokens with a score [V] from which the race can still be won, in order; at least the `best` ones.

    Nobody's time is below the earliest: who is behind the favourite even with that has lost.
    """
    favourite = int(scores.argmax())
    lead = math.log(times.of(np.array([favourite]))[0] / times.earliest)
    floor = float(scores[favourite]) - temperature * lead
    if best:
        # As many tokens as there are columns are no worse than the columns' maxima.
        columns = scores[: len(scores) // _COLUMN * _COLUMN].reshape(_COLUMN, -1).max(axis=0)
        some = columns if best <= len(columns) else scores
        floor = min(floor, float(np.partition(some, -best)[-best]))
    return np.flatnonzero(scores >= floor - _ROUNDING * (1 + abs(floor)))


def _logprobs(scores: processors.Scores, token: int, count: int) -> TokenLogprobs:
    with np.errstate(divide="ignore"):
        values = np.log(processors.softmax(scores))
    best = np.argpartition(-values, min(count, len(values) - 1))[:count]
    best = best[np.argsort(-values[best], kind="stable")]
    return TokenLogprobs(float(values[token]), [(int(i), float(values[i])) for i in best if values[i] > -np.inf])
