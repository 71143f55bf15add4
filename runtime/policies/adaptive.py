"""A tree that grows as long as a level gains more than it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dovetail.runtime.policies.chances import Chances, best_count

LEAST_CHANCE = 0.005  # smaller ones are not worth the host's time


class AdaptiveBudget:
    """One round's tree of one text.

    Text is made fastest when each round maximises `tokens - rate * milliseconds`, where `rate` is the tokens per
    millisecond that can be kept up in the long run (the reward of a renewal process; Dinkelbach 1967). So a level, or
    a node, is worth drafting while what it gains exceeds `rate` times what it costs on the measured curve, whose steps
    decide how many nodes come along for nothing.
    """

    # Plain Python over a few dozen numbers: what can't earn its price is dropped before anything is sorted.

    def __init__(
        self,
        chances: Chances,
        *,
        width: int,
        depth: int,
        passes: Sequence[float],
        level_ms: float,
        rate: float,
        trust: float,
    ) -> None:
        """`depth` levels at most; `passes[n]` milliseconds of the pass with n of its nodes, as far as it may grow;
        `level_ms` of one more level; `trust` multiplies every chance.
        """
        self.width = width
        self._depth, self._passes, self._level_ms, self._rate, self._trust = depth, passes, level_ms, rate, trust
        self._chances, self._least = chances, LEAST_CHANCE / max(trust, LEAST_CHANCE)

    def wants_level(self, levels: Sequence[Sequence[float]]) -> bool:
        """See `TreeBudget`."""
        if not levels:
            return self._depth > 0
        newest = sorted(self._chances.of(levels[-1], self._least), reverse=True)
        if len(levels) >= self._depth or not newest:
            return False
        so_far = [chance for level in levels[:-1] for chance in self._chances.of(level, self._least)] + newest
        so_far.sort(reverse=True)
        by_rank = self._chances.by_rank
        shares = by_rank[min(len(levels), len(by_rank) - 1)][: self.width]
        children = [parent * share for parent in newest[: self.width] for share in shares]
        ahead = so_far + [child for child in children if child >= LEAST_CHANCE]
        ahead.sort(reverse=True)
        return self._gain(ahead) - self._gain(so_far) > self._rate * self._level_ms

    def _gain(self, chances: Sequence[float]) -> float:
        return best_count(chances, self._passes, self._rate, self._trust)[1]


def promised_gain(
    chances: Chances,
    *,
    width: int,
    depth: int,
    passes: Sequence[float],
    draft_ms: Callable[[int], float],
    rate: float,
    trust: float,
) -> float:
    """Before anything is drafted: the tokens that the best tree of any depth is expected to bring, less what its time
    makes anyway. By the ranks alone, so what confidence adds is left out. `draft_ms` of a number of levels; the others
    as in `AdaptiveBudget`.
    """
    best, level, nodes = 0.0, [1.0], list[float]()
    for levels in range(1, depth + 1):
        shares = chances.by_rank[min(levels - 1, len(chances.by_rank) - 1)][:width]
        level = sorted((parent * share for parent in level for share in shares), reverse=True)[:width]
        nodes = sorted(nodes + level, reverse=True)
        best = max(best, best_count(nodes, passes, rate, trust)[1] - rate * draft_ms(levels))
        if level[0] < LEAST_CHANCE:
            break
    return best
