"""How much a text repeats itself: what loops is easy to draft, so a speed is read beside it."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 8


def repeated_share(texts: Sequence[Sequence[int]], size: int = NGRAM) -> float:
    """The share of n-grams of tokens that had occurred before in the same text.

    >>> repeated_share([[1, 2, 3, 1, 2]], size=2)  # 12, 23, 31, and 12 again
    0.25
    """
    total = repeated = 0
    for text in texts:
        grams = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0
