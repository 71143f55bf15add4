"""What is done to a row of the target's logits before a token is drawn from it: one pure function per control.

Every function maps scores [V] float64 to scores [V] and may write into its argument; a token that must not be drawn
gets minus infinity. The formulas and their order are those of transformers' `generate`; presence and frequency
penalty are OpenAI's. All see the text on the tree's path up to the row, never the rest of the tree. V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


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


def penalise_presence_and_frequency(scores: Scores, counts: Counts, presence: float, frequency: float) -> Scores:
    """Subtract `presence` once, and `frequency` per occurrence, for tokens generated so far; `counts` [V]."""
    used = np.flatnonzero(counts)
    scores[used] -= presence + frequency * counts[used]
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
    unlikely = probabilities <= (1 - mass) / len(scores)
    likely = np.flatnonzero(~unlikely)
    order = likely[np.argsort(scores[likely], kind="stable")]
    dropped = probabilities[unlikely].sum() + np.cumsum(probabilities[order]) <= 1 - mass
    dropped[-1] = False
    scores[unlikely] = -np.inf
    scores[order[dropped]] = -np.inf
    return scores


def keep_min_p(scores: Scores, share: float) -> Scores:
    """Drop tokens less likely than `share` of the most likely one (Nguyen et al. 2024, arXiv 2407.01082)."""
    probabilities = softmax(scores)
    scores[probabilities < share * probabilities.max()] = -np.inf
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
    weights: Scores = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights
