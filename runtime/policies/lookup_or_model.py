"""Which draft makes a round's tree: matches in the text, or the model.

Text is made fastest where each round maximises `tokens - rate * milliseconds`, `rate` being the tokens per millisecond
that are kept up in the long run (see `MarginalPolicy`). Of matches that is known before the round: how likely they are,
and what a pass over them costs. Of the model it is not: what its last rounds were worth stands for the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dovetail.runtime.policies.base import LOOKUP_TREE, Growth, Policy
from dovetail.runtime.policies.costs import Costs, PriceList, Prices
from dovetail.runtime.policies.marginal import best_count

_MEMORY = 0.9  # weight of the past, a round
_PRIOR_ROUNDS = 4.0  # as many stand before the first of a text
_PRIOR_TOKENS = 3.0  # of a round of the model, which is taken to keep the pace
_RETRIAL = 0.1  # of a round: what matches get back of their credit in every round without them


class MixedPolicy:
    """A policy for the model, and beside it when to take matches. See `Policy`."""

    def __init__(self, model: Policy, costs: Costs, rate: float) -> None:
        """`rate`: tokens per millisecond of both together, before a text says so itself."""
        self.model, self._prices, self._prior_rate = model, PriceList(costs), rate
        self.begin()

    def begin(self) -> None:
        """Forget the last text."""
        self.model.begin()
        self._growth: MixedGrowth | None = None
        self._all, self._drafted = _Pace(self._prior_rate), _Pace(self._prior_rate)  # all rounds, the model's
        self._trust = _Mean(1.0)  # accepted tokens of a match over those it promised

    def growth(self, room: int, context: int) -> Growth:
        """The model's, behind matches that must beat it."""
        prices = self._prices.at(context)
        rate = max(self._all.rate, 1 / prices.plain)
        matches = MatchGrowth(room - 1, prices.passes, rate, self._trust.value, self._drafted.worth(rate))
        self._growth = MixedGrowth(self.model.growth(room, context), matches, prices)
        return self._growth

    def observe(self, accept_length: int) -> None:
        """Learn from the round, of the draft that made it."""
        last = self._growth
        assert last is not None
        tokens, ms = accept_length + 1, last.round_ms
        if last.matches.count:
            self._trust.add(accept_length / last.matches.promised)
        else:
            self._trust.add(1.0, _RETRIAL)
            self._drafted.add(tokens, ms)
            self.model.observe(accept_length)
        self._all.add(tokens, ms)


class MixedGrowth:
    """The model's growth, with matches before it."""

    def __init__(self, model: Growth, matches: MatchGrowth, prices: Prices) -> None:
        self.width, self.matches = model.width, matches
        self._model, self._prices = model, prices
        self._depth = self._count = 0  # levels and nodes that the model drafted

    def goes_on(self, depth: int, scores: Sequence[float]) -> bool:
        """As the model's says."""
        more = self._model.goes_on(depth, scores)
        self._depth = depth + more
        return more

    def drafted(self, scores: Sequence[float]) -> int:
        """As the model's says."""
        self._count = self._model.drafted(scores)
        return self._count

    @property
    def round_ms(self) -> float:
        """What the round costs, by the measured prices."""
        if self.matches.count:
            return self._prices.round_ms(self.matches.count + 1, 0, 0)
        return self._prices.round_ms(self._count + 1, self._depth, self.width)


class MatchGrowth:
    """Matches of one round: as many as pay, and none unless they are worth more than the model's round.

    A lookup's scores are logarithms of the chances that it gives its guesses itself.
    """

    width = LOOKUP_TREE.width
    matches = None

    def __init__(self, depth: int, passes: Sequence[float], rate: float, trust: float, worth: float) -> None:
        """`passes` [nodes + 1] milliseconds, entry 0 standing for nothing; `rate` tokens per millisecond; `trust`
        multiplies every chance; `worth` in tokens is the model's round, less what `rate` makes in its time.
        """
        self._depth = min(depth, LOOKUP_TREE.depth)
        self._passes, self._trust, self._worth = passes[: LOOKUP_TREE.nodes + 1], trust, worth
        self.rate = rate
        self.count = 0  # kept
        self.promised = 0.0  # accepted tokens by the lookup's own chances

    def goes_on(self, depth: int, scores: Sequence[float]) -> bool:
        """Down to the limit: looking costs next to nothing."""
        return depth < self._depth

    def drafted(self, scores: Sequence[float]) -> int:
        """See the class."""
        chances = [math.exp(score) for score in scores]
        count, value = best_count(chances, self._passes, self.rate, self._trust)
        if count and 1 + value > self._worth:
            self.count, self.promised = count, sum(chances[:count])
        return self.count


class _Mean:
    """A running mean that begins with a prior and forgets."""

    def __init__(self, prior: float) -> None:
        self._sum, self._weight = _PRIOR_ROUNDS * prior, _PRIOR_ROUNDS

    @property
    def value(self) -> float:
        return self._sum / self._weight

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum = _MEMORY**weight * self._sum + weight * value
        self._weight = _MEMORY**weight * self._weight + weight


class _Pace:
    """Tokens and milliseconds of a round."""

    def __init__(self, rate: float) -> None:
        self._tokens, self._ms = _Mean(_PRIOR_TOKENS), _Mean(_PRIOR_TOKENS / rate)

    @property
    def rate(self) -> float:
        return self._tokens.value / self._ms.value

    def worth(self, rate: float) -> float:
        """Tokens of a round, less what `rate` makes in its time."""
        return self._tokens.value - rate * self._ms.value

    def add(self, tokens: float, ms: float) -> None:
        self._tokens.add(tokens)
        self._ms.add(ms)


_EVEN = Costs((1,), (1, LOOKUP_TREE.nodes), (1,), (1.0,), ((1.0, 1.0),), (1e-3,), ((1e-3,),), 0, 0, 0)


def unmeasured(model: Policy) -> MixedPolicy:
    """Where nothing is known of the machine: every round is taken to cost the same, so the draft that makes more tokens
    is asked; before the first round the model is taken to make three.
    """
    return MixedPolicy(model, _EVEN, rate=3.0)
