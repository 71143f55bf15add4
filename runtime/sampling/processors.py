"""What is done to a row of the target's logits before a token is drawn from it: one pure function per control, and the
order in which they act.

Every function maps scores [V] float64 to scores [V] and may write into its argument; a token that must not be drawn
gets minus infinity. The formulas and their order are those of transformers' `generate`; presence and frequency
penalty are OpenAI's. All see the text on the tree's path up to the row, never the rest of the tree. V: vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(slots=True)
class TextSoFar:
    """What the steps may know of the text before the row."""

    tokens: list[int]  # prompt and answer
    prompt_length: int
    seen: npt.NDArray[np.bool_]  # [V] tokens of prompt and answer
    counts: Counts  # [V] of the answer's tokens
    end_tokens: frozenset[int]

    @property
    def position(self) -> int:
        """The output position of the next token, from 0."""
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> None:
        """The answer goes on with `token`."""
        self.tokens.append(token)
        self.seen[token] = True
        self.counts[token] += 1

    def cut(self, position: int) -> None:
        """Take the answer back to its first `position` tokens."""
        length = self.prompt_length + position
        for token in self.tokens[length:]:
            self.counts[token] -= 1
        dropped = set(self.tokens[length:])
        del self.tokens[length:]
        self.seen[sorted(dropped - set(self.tokens))] = False


Step = Callable[[Scores, Any, TextSoFar], Scores]
"""What one control does: scores, the control's value, the text."""


def bias(scores: Scores, logit_bias: Mapping[int, float]) -> Scores:
    """Add to the logits of some tokens."""
    for token, value in logit_bias.items():
        scores[token] += value
    return scores


def penalise_repetition(scores: Scores, seen: npt.NDArray[np.bool_], penalty: float) -> Scores:
    """Divide positive logits of tokens in the text by `penalty`, multiply negative ones (CTRL, Keskar et al. 2019,
    section 4.1).
    """
    touched = scores[seen]
    scores[seen] = np.where(touched < 0, touched * penalty, touched / penalty)
    return scores


def penalise_presence(scores: Scores, counts: Counts, penalty: float) -> Scores:
    """Subtract `penalty` for tokens generated so far; `counts` [V]."""
    scores[counts > 0] -= penalty
    return scores


def penalise_frequency(scores: Scores, counts: Counts, penalty: float) -> Scores:
    """Subtract `penalty` for every time that a token was generated so far; `counts` [V]."""
    used = np.flatnonzero(counts)
    scores[used] -= penalty * counts[used]
    return scores


def ban_repeated_ngrams(scores: Scores, text: Sequence[int], size: int) -> Scores:
    """No n-gram of `size` tokens may occur twice in the text, prompt included."""
    if len(text) < size:
        return scores
    prefix = list(text[len(text) - size + 1 :])
    tokens = np.array(text)
    starts = np.arange(len(text) - size + 1)
    for offset, token in enumerate(prefix):
        starts = starts[tokens[starts + offset] == token]
    scores[tokens[starts + size - 1]] = -np.inf
    return scores


def ban_words(scores: Scores, text: Sequence[int], words: Sequence[Sequence[int]]) -> Scores:
    """Ban the last token of every word whose other tokens end the text."""
    for *begin, last in words:
        if not begin or list(text[-len(begin) :]) == begin:
            scores[last] = -np.inf
    return scores


def ban(scores: Scores, tokens: Sequence[int]) -> Scores:
    """Ban tokens outright."""
    scores[list(tokens)] = -np.inf
    return scores


def keep_top_k(scores: Scores, k: int) -> Scores:
    """Keep the k best; tokens that tie with the k-th stay too."""
    if k < len(scores):
        threshold = np.partition(scores, -k)[-k]
        scores[scores < threshold] = -np.inf
    return scores


def keep_top_p(scores: Scores, mass: float) -> Scores:
    """Keep the smallest set of most likely tokens whose probability reaches `mass` (Holtzman et al. 2019, arXiv
    1904.09751).
    """
    probabilities = softmax(scores)
    # All tokens this unlikely together have at most 1 - mass: they are dropped in any case and need no sorting.
    likely = np.flatnonzero(probabilities >= (1 - mass) / len(scores))
    order = likely[np.argsort(scores[likely], kind="stable")[::-1]]
    kept = order[: 1 + np.count_nonzero(np.cumsum(probabilities[order]) < mass)]
    best = scores[kept]
    scores[:] = -np.inf
    scores[kept] = best
    return scores


def keep_min_p(scores: Scores, share: float) -> Scores:
    """Drop tokens less likely than `share` of the most likely one (Nguyen et al. 2024, arXiv 2407.01082)."""
    # Shares of the best one, not of all, so that a part of the vocabulary gives the same.
    scores[np.exp(scores - scores.max()) < share] = -np.inf
    return scores


def keep_typical(scores: Scores, mass: float) -> Scores:
    """Keep those whose surprise is nearest to the entropy, up to `mass` (Meister et al. 2022, arXiv 2202.00666)."""
    probabilities = softmax(scores)
    with np.errstate(divide="ignore"):
        surprise = -np.log(probabilities)
    possible = probabilities > 0
    entropy = float((probabilities[possible] * surprise[possible]).sum())
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(probabilities[order]) < mass).sum()), len(order) - 1)
    dropped = distance > distance[order[last]]
    dropped[order[0]] = False
    scores[dropped] = -np.inf
    return scores


def softmax(scores: Scores) -> Scores:
    """[V] probabilities."""
    weights: Scores = scores - scores.max()
    np.exp(weights, out=weights)  # in place: memory for another [V] takes longer than this
    weights /= weights.sum()
    return weights


LOGIT_STEPS: Mapping[str, Step] = {
    "logit_bias": lambda scores, biases, text: bias(scores, biases),
    "repetition_penalty": lambda scores, penalty, text: penalise_repetition(scores, text.seen, penalty),
    "presence_penalty": lambda scores, penalty, text: penalise_presence(scores, text.counts, penalty),
    "frequency_penalty": lambda scores, penalty, text: penalise_frequency(scores, text.counts, penalty),
    "no_repeat_ngram_size": lambda scores, size, text: ban_repeated_ngrams(scores, text.tokens, size),
    "bad_words_ids": lambda scores, words, text: ban_words(scores, text.tokens, words),
    "suppress_tokens": lambda scores, tokens, text: ban(scores, sorted(tokens)),
    "min_new_tokens": lambda scores, count, text: (
        ban(scores, sorted(text.end_tokens)) if text.position < count else scores
    ),
    "min_length": lambda scores, length, text: (
        ban(scores, sorted(text.end_tokens)) if len(text.tokens) < length else scores
    ),
}
"""By control, in the order in which they act: they may change which token is the best, so greedy decoding has them
too.
"""

SHAPE_STEPS: Mapping[str, Step] = {
    "temperature": lambda scores, temperature, text: np.divide(scores, temperature, out=scores),
    "top_k": lambda scores, k, text: keep_top_k(scores, k),
    "top_p": lambda scores, mass, text: keep_top_p(scores, mass),
    "min_p": lambda scores, share, text: keep_min_p(scores, share),
    "typical_p": lambda scores, mass, text: keep_typical(scores, mass),
}
"""Behind them, of sampling alone: they change how likely tokens are, from logits or a draft's log-probabilities."""


def steps(order: Mapping[str, Step], changes: Mapping[str, Any]) -> list[tuple[Step, Any]]:
    """Those of the controls in `changes`, with their values."""
    return [(step, changes[name]) for name, step in order.items() if name in changes]
