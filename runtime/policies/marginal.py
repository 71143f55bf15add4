"""A tree that grows as long as it earns what it costs."""

from __future__ import annotations

import bisect
import dataclasses
import operator
from collections.abc import Sequence

from dovetail.runtime.policies.base import NO_GROWTH, Growth
from dovetail.runtime.policies.costs import Costs, PriceList, Prices
from dovetail.runtime.trees.shape import TreeShape

SCORE_STEP = 0.1  # nats: width of a bin of scores in `Chances`
_MEMORY = 0.95  # weight of the past, a round: what is learnt of a text is of its last 20 rounds
_PRIOR_ROUNDS = 12  # as many rounds of the calibration's text stand before the first of this one
_MARGIN = 0.98  # of plain decoding's speed: below it a text's draft rests
_PROBE = 4  # rounds between two rests
_LONGEST_REST = 512
_LEAST = 0.005  # smaller chances are not worth the host's time


@dataclasses.dataclass(frozen=True, slots=True)
class Chances:
    """How likely the target follows the draft, as calibration found it on a pair's own text.

    `by_score[i]`: that a whole path is accepted whose score lies in [-(i + 1), -i) * SCORE_STEP, descending in i.
    `by_rank[d][r]`: that the child of rank r + 1 at depth d + 1 is accepted, given that its parent was.
    """

    by_score: tuple[float, ...]
    by_rank: tuple[tuple[float, ...], ...]

    def of(self, scores: Sequence[float], least: float) -> list[float]:
        """The chances of those `scores` that have more than `least`."""
        table = self.by_score
        worth = min(bisect.bisect_left(table, -least, key=operator.neg), len(table) - 1)  # bins: the table never rises
        floor = -SCORE_STEP * worth
        return [table[int(score / -SCORE_STEP)] for score in scores if score > floor]


class MarginalPolicy:
    """Every round gets the tree that this text's confidences and this machine's prices call for.

    Text is made fastest when each round maximises `tokens - rate * milliseconds`, where `rate` is the tokens per
    millisecond that can be kept up in the long run (the reward of a renewal process; Dinkelbach 1967). So a level, or
    a node, is worth drafting while what it gains exceeds `rate` times what it costs on the measured curve, whose steps
    decide how many nodes come along for nothing. What the text so far says corrects both the chances and the rate;
    where it falls behind plain decoding the draft rests, and is tried again ever more rarely.
    """

    def __init__(self, costs: Costs, chances: Chances, limit: TreeShape, rate: float) -> None:
        """`limit`: the largest tree, and the width of all; `rate`: tokens per millisecond on the calibration's text."""
        self._prices, self._chances = PriceList(costs), chances
        self._limit = dataclasses.replace(limit, nodes=min(limit.nodes, costs.nodes[-1]))
        self._rate = rate
        self.begin()

    def begin(self) -> None:
        """Forget the last text."""
        self._growth: MarginalGrowth | None = None
        self._tokens, self._ms = float(_PRIOR_ROUNDS), _PRIOR_ROUNDS / self._rate
        self._hoped, self._accepted = float(_PRIOR_ROUNDS), float(_PRIOR_ROUNDS)
        self._rest, self._next_rest, self._probes = 0, 16, 0

    def growth(self, room: int, context: int) -> Growth:
        """Towards the best tree at this context."""
        self._growth = None
        prices = self._prices.at(context)
        if self._rest:
            self._rest -= 1
            return NO_GROWTH
        rate = self._tokens / self._ms
        plain_rate = 1 / prices.plain
        if rate < _MARGIN * plain_rate and self._probes <= 0:
            self._rest, self._next_rest = self._next_rest - 1, min(2 * self._next_rest, _LONGEST_REST)
            self._probes = _PROBE
            return NO_GROWTH
        self._probes -= 1
        depth = min(self._limit.depth, room - 1)
        if depth < 1:
            return NO_GROWTH
        trust = self._accepted / self._hoped
        self._growth = MarginalGrowth(prices, self._chances, self._limit, depth, max(rate, plain_rate), trust)
        return self._growth

    def observe(self, accept_length: int) -> None:
        """Learn from the round, if its tree was grown here."""
        grown = self._growth
        if grown is None or not grown.depth:
            return
        self._tokens = _MEMORY * self._tokens + accept_length + 1
        self._ms = _MEMORY * self._ms + grown.round_ms
        self._hoped = _MEMORY * self._hoped + grown.hoped
        self._accepted = _MEMORY * self._accepted + accept_length


class MarginalGrowth:
    """One round of `MarginalPolicy`. `trust` multiplies every chance."""

    # Plain Python over a few dozen numbers: what can't earn its price is dropped before anything is sorted.
    matches = None

    def __init__(
        self, prices: Prices, chances: Chances, limit: TreeShape, deepest: int, rate: float, trust: float
    ) -> None:
        self.width = limit.width
        self.depth = 0  # levels drafted
        self.round_ms = prices.plain
        self.hoped = 0.0  # accepted tokens, by the calibration's chances alone
        self._prices, self._chances, self._deepest, self._rate, self._trust = prices, chances, deepest, rate, trust
        self._passes = prices.passes[: limit.nodes + 1]
        self._found: list[float] = []  # chances of all candidates so far that may earn their price, descending

    def goes_on(self, depth: int, scores: Sequence[float]) -> bool:
        """Whether one more level gains more than it costs."""
        self.depth = depth
        if depth == 0:
            return True
        newest = self._chances.of(scores, _LEAST / self._trust)
        newest.sort(reverse=True)
        self._found += newest
        self._found.sort(reverse=True)
        if depth >= self._deepest or not newest:
            return False
        follow = self._chances.by_rank[min(depth, len(self._chances.by_rank) - 1)][: self.width]
        children = [parent * share for parent in newest[: self.width] for share in follow]
        ahead = self._found + [child for child in children if child >= _LEAST]
        ahead.sort(reverse=True)
        gain = self._best(ahead)[1] - self._best(self._found)[1]
        return gain > self._rate * self._prices.level(self.width)

    def drafted(self, scores: Sequence[float]) -> int:
        """As many as earn their price on the stepped curve."""
        count, _ = self._best(self._found)
        self.hoped = sum(self._found[:count])
        self.round_ms = self._prices.round_ms(count + 1, self.depth, self.width)
        return count

    def _best(self, chances: Sequence[float]) -> tuple[int, float]:
        """How many of `chances`, descending, to verify, and the value of that: tokens less the pass's price."""
        return best_count(chances, self._passes, self._rate, self._trust)


def best_count(chances: Sequence[float], passes: Sequence[float], rate: float, trust: float = 1.0) -> tuple[int, float]:
    """(n, value) of the n best of `chances` [descending] that maximises `trust * sum - rate * passes[n + 1]`."""
    total, best, best_value = 0.0, 0, -rate * passes[1]
    for count, (chance, ms) in enumerate(zip(chances, passes[2:], strict=False), 1):
        total += chance
        value = trust * total - rate * ms
        if value > best_value:
            best, best_value = count, value
    return best, best_value
