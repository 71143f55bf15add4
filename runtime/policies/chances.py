"""How likely the target follows a draft."""

from __future__ import annotations

import bisect
import dataclasses
import math
import operator
from collections.abc import Sequence

SCORE_STEP = 0.1  # nats: width of a bin of scores
SCORE_BINS = 70


@dataclasses.dataclass(frozen=True, slots=True)
class Chances:
    """How likely the target follows the draft, as calibration found it on a pair's own text.

    `by_score[i]`: that a whole path is accepted whose score lies in [-(i + 1), -i) * SCORE_STEP, descending in i.
    `by_rank[d][r]`: that the child of rank r + 1 at depth d + 1 is accepted, given that its parent was.
    """

    by_score: tuple[float, ...]
    by_rank: tuple[tuple[float, ...], ...]

    @classmethod
    def estimated(cls) -> Chances:
        """Where nothing was measured: a draft's probabilities are taken for the chances, and half of the first
        children to be accepted, a quarter as many of each further rank.
        """
        by_score = tuple(math.exp(-SCORE_STEP * (i + 0.5)) for i in range(SCORE_BINS))
        return cls(by_score, (tuple(0.5 / 4**rank for rank in range(8)),))

    def of(self, scores: Sequence[float], least: float) -> list[float]:
        """The chances of those `scores` that have more than `least`, in their order."""
        table = self.by_score
        worth = len(table) - 1  # bins that are looked at: the table never rises
        if least > 0:
            worth = min(bisect.bisect_left(table, -least, key=operator.neg), worth)
        floor = -SCORE_STEP * worth
        return [table[int(score / -SCORE_STEP)] for score in scores if score > floor]


def best_count(chances: Sequence[float], passes: Sequence[float], rate: float, trust: float = 1.0) -> tuple[int, float]:
    """How many of `chances`, descending, are worth verifying, and what that gains in tokens: the n that maximises
    `trust * sum(chances[:n]) - rate * (passes[n] - passes[0])`, `passes[n]` being the milliseconds of a pass with n of
    them and `rate` the tokens per millisecond that are made anyway.
    """
    total, best, best_gain = 0.0, 0, 0.0
    for count, (chance, ms) in enumerate(zip(chances, passes[1:], strict=False), 1):
        total += chance
        gain = trust * total - rate * (ms - passes[0])
        if gain > best_gain:
            best, best_gain = count, gain
    return best, best_gain
