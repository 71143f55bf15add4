"""How likely a target finds a given text, and how far two targets' distributions are apart on it.

Export compares an artifact with its source by this, calibration a quantised target with a float one.

Letters: T tokens, C of them in a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dovetail.runtime.targets.base import Step, TargetEngine
from dovetail.runtime.trees.tree import Int64s, chain

Float64s = npt.NDArray[np.float64]

_MAX_EXPONENT = 700.0  # math.exp overflows beyond
_CHUNK_LOGITS = 1 << 23  # at a time: 32 MB of float32 numbers
_CHUNK_ROWS = 64, 256  # at least, at most


def log_softmax(logits: npt.NDArray[np.floating[Any]]) -> Float64s:
    """Log-probabilities of logits [C, V], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def chunks(tokens: Int64s, vocab_size: int) -> Iterator[Int64s]:
    """`tokens` [T] in parts that are smaller where a large vocabulary makes rows of logits large."""
    low, high = _CHUNK_ROWS
    size = min(max(low, _CHUNK_LOGITS // vocab_size), high)
    return (tokens[begin : begin + size] for begin in range(0, len(tokens), size))


def log_probs(engine: TargetEngine, tokens: Int64s, text_length: int | None = None) -> Iterator[Float64s]:
    """[C, V] a chunk: what the target expects behind each of `tokens` [T], read from an empty cache, as the beginning
    of a text of `text_length`, None: T.
    """
    sequence = engine.sequence()
    sequence.set_text_length(text_length or len(tokens))
    try:
        for chunk in chunks(tokens, engine.info.vocab_size):
            out = engine.forward([Step(sequence, chain(chunk), is_prompt=True)])[0]
            sequence.commit(range(len(chunk)))
            yield log_softmax(out.logits)
    finally:
        sequence.close()


class Divergence:
    """Adds up, row by row, how far a target's distributions are from a reference's. KL in nats a token."""

    def __init__(self) -> None:
        self._divergences: list[Float64s] = []
        self._losses = [0.0, 0.0]  # the target's, the reference's: minus log-likelihood of the text
        self._agreed = 0

    def add(self, ours: Float64s, reference: Float64s, following: Int64s) -> None:
        """Log-probabilities [C, V] of both, and the tokens [C] that really follow."""
        picked = np.arange(len(following)), following
        self._losses[0] -= float(ours[picked].sum())
        self._losses[1] -= float(reference[picked].sum())
        self._divergences.append((np.exp(reference) * (reference - ours)).sum(axis=1))
        self._agreed += int((reference.argmax(axis=1) == ours.argmax(axis=1)).sum())

    @property
    def tokens(self) -> int:
        """Predictions compared."""
        return sum(map(len, self._divergences))

    @property
    def perplexity(self) -> float:
        """Of the text, by the target."""
        return math.exp(min(self._losses[0] / self.tokens, _MAX_EXPONENT))

    @property
    def reference_perplexity(self) -> float:
        """Of the text, by the reference."""
        return math.exp(min(self._losses[1] / self.tokens, _MAX_EXPONENT))

    @property
    def kl_mean(self) -> float:
        """From the reference to the target; rounding may take single rows below 0, which count as 0."""
        return float(self._all().mean())

    @property
    def kl_p99(self) -> float:
        """Of 100 tokens, 99 diverge less."""
        return float(np.percentile(self._all(), 99))

    @property
    def argmax_agreement(self) -> float:
        """The share of tokens where both have the same favourite."""
        return self._agreed / self.tokens

    def _all(self) -> Float64s:
        return np.maximum(np.concatenate(self._divergences), 0)
