"""Drawing the target's next token: the processors on one row of logits, then a race between the tokens.

Token v at output position i arrives after a time drawn from (seed, i, v) alone, divided by v's probability; the first
to arrive is drawn. With exponential times that is a fair draw (the Gumbel-max trick, Maddison et al. 2014, arXiv
1411.0030, section 2), and rounding matters only where the two first arrive together: so with `exact` numerics the same
seed gives the same tokens with any draft, any tree, or none.

The times are known before the target's probabilities are. So a draft that is right about the probabilities is right
about the draw, too: `foresee` lets its candidates run the same race (coupling without communication, Daliri et al.
2024, arXiv 2408.07978).

Letters: V vocabulary, R rows of candidates, K candidates in a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dovetail.runtime.errors import NothingAllowedError, TargetError
from dovetail.runtime.sampling import processors
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.random_times import RandomTimes
from dovetail.runtime.trees.tree import Float32s, Integers

_IMPOSSIBLE = -1e3  # nats: a score that can still be added up


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities after processing: of the drawn token, and of the most likely ones."""

    logprob: float
    top: list[tuple[int, float]]  # token, logprob; best first


class Sampler:
    """Draws the tokens of one text, in order. Every draw is emitted, so the sampler's text is the text."""

    def __init__(self, config: GenerationConfig, prompt: Sequence[int], vocab_size: int, sequence: int = 0) -> None:
        """`sequence` numbers the texts of one request; each has random numbers of its own."""
        self._config = config
        self._text = list(prompt)
        self._prompt_length = len(self._text)
        self._times = RandomTimes(config.seed + (sequence << 64), vocab_size)
        self._seen = np.zeros(vocab_size, np.bool_)
        self._seen[self._text] = True
        self._counts = np.zeros(vocab_size, np.int64)
        self.logprobs: list[TokenLogprobs] = []  # one per draw, if the config asks for them

    def draw(self, logits: Float32s) -> int:
        """The token at the next output position from the target's row `logits` [V]."""
        if not np.isfinite(logits.max()):  # NaN anywhere is the maximum
            raise TargetError(
                f"expected finite logits at output position {self._position}, got NaN or infinity from the target; "
                "the weights are damaged or overflow, export the artifact again"
            )
        config = self._config
        if config.temperature == 0 and self._plain and config.logprobs is None:
            token = int(logits.argmax())
        else:
            scores = self.processed(logits)
            token = self._pick(scores)
            if config.logprobs is not None:
                self.logprobs.append(_logprobs(scores, token, config.logprobs))
        self.follow(token)
        return token

    def follow(self, token: int) -> None:
        """The text goes on with `token`."""
        self._text.append(token)
        self._seen[token] = True
        self._counts[token] += 1

    def rewind(self, count: int) -> None:
        """Take draws back until `count` are left."""
        if count == self._position:
            return
        length = self._prompt_length + count
        del self._text[length:]
        del self.logprobs[count:]
        self._seen[:] = False
        self._seen[self._text] = True
        self._counts[:] = 0
        np.add.at(self._counts, self._text[self._prompt_length :], 1)

    def foresee(self, paths: Sequence[Sequence[int]], tokens: Integers, log_probs: Float32s) -> Float32s:
        """What a draft may know of the draws behind `paths` [R], tokens that may come next, all equally many: its
        candidates `tokens` [R, K] with `log_probs` [R, K] become those that arrive first. Log-probabilities [R, K]
        within the row; of greedy decoding, which leaves nothing to chance, the draft's own.
        """
        if self._config.temperature == 0:
            return log_probs
        times = self._times.at(self._position + len(paths[0]))
        # What top-k, top-p and the like keep the target from drawing may not win here; nearly, with K candidates of V.
        scores = np.stack([self._warped(row) for row in log_probs.astype(np.float64)])
        arrivals = scores - np.log(times[tokens])
        arrivals -= arrivals.max(axis=1, keepdims=True)
        arrivals -= np.log(np.exp(arrivals).sum(axis=1, keepdims=True))
        return np.maximum(arrivals, _IMPOSSIBLE).astype(np.float32)

    def processed(self, logits: Float32s) -> processors.Scores:
        """[V] scores after every control, in transformers' order; minus infinity cannot be drawn."""
        config, scores = self._config, logits.astype(np.float64)
        if config.logit_bias:
            scores = processors.bias(scores, config.logit_bias)
        if config.repetition_penalty != 1:
            scores = processors.penalise_repetition(scores, self._seen, config.repetition_penalty)
        if config.presence_penalty or config.frequency_penalty:
            scores = processors.penalise_presence_and_frequency(
                scores, self._counts, config.presence_penalty, config.frequency_penalty
            )
        if config.no_repeat_ngram_size:
            scores = processors.ban_repeated_ngrams(scores, self._text, config.no_repeat_ngram_size)
        if config.bad_words_ids:
            scores = processors.ban_words(scores, self._text, config.bad_words_ids)
        if self._position < config.min_new_tokens and config.eos_token_id:
            scores = processors.ban(scores, sorted(config.eos_token_id))
        if scores.max() == -np.inf:
            raise NothingAllowedError(
                f"expected at least one token that may follow at output position {self._position}, got none: bans and "
                "biases exclude the whole vocabulary; relax no_repeat_ngram_size, bad_words_ids or logit_bias"
            )
        if config.temperature > 0:
            scores = self._warped(scores)
        return scores

    def _warped(self, scores: processors.Scores) -> processors.Scores:
        config = self._config
        scores /= config.temperature
        if config.top_k:
            scores = processors.keep_top_k(scores, config.top_k)
        if config.top_p < 1:
            scores = processors.keep_top_p(scores, config.top_p)
        if config.min_p:
            scores = processors.keep_min_p(scores, config.min_p)
        if config.typical_p < 1:
            scores = processors.keep_typical(scores, config.typical_p)
        return scores

    @property
    def _position(self) -> int:
        return len(self._text) - self._prompt_length

    @property
    def _plain(self) -> bool:
        """Whether no processor would change which token is the best."""
        config = self._config
        return (
            config.repetition_penalty == 1
            and not config.presence_penalty
            and not config.frequency_penalty
            and not config.logit_bias
            and not config.no_repeat_ngram_size
            and not config.bad_words_ids
            and not (config.eos_token_id and self._position < config.min_new_tokens)
        )

    def _pick(self, scores: processors.Scores) -> int:
        if self._config.temperature == 0:
            return int(scores.argmax())
        weights = np.exp(scores - scores.max())
        return int((weights / self._times.at(self._position)).argmax())


def _logprobs(scores: processors.Scores, token: int, count: int) -> TokenLogprobs:
    with np.errstate(divide="ignore"):
        values = np.log(processors.softmax(scores))
    best = np.argpartition(-values, min(count, len(values) - 1))[:count]
    best = best[np.argsort(-values[best], kind="stable")]
    return TokenLogprobs(float(values[token]), [(int(i), float(values[i])) for i in best if values[i] > -np.inf])
