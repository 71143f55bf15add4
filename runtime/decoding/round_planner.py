"""What one pass over the weights is filled with: tokens of prompts, and the nodes of all texts' trees.

Letters: S texts that decode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dovetail.runtime.policies.chances import best_count
from dovetail.runtime.policies.costs import Costs, PriceList, Prices
from dovetail.runtime.policies.pace import Pace, speed_gain

PROMPT_TOKENS = 256  # of a pass in which no text decodes
PROMPT_TOKENS_BESIDE = 64  # of one in which some do: their next tokens wait for it


@dataclasses.dataclass(frozen=True, slots=True)
class PassLoad:
    """A pass before any node is drafted: `rows` are the prompts' tokens and a root of each of the S decoding texts.

    Text is made fastest when each round maximises `tokens - rate * milliseconds` (see `AdaptiveBudget`). `gain` is how
    many times plain decoding's speed these texts are made in the long run, so `rate` is that of all together.
    """

    prices: Prices
    texts: int  # S
    rows: int
    gain: float
    _curve: list[float] = dataclasses.field(default_factory=list, compare=False)  # `passes`, as far as it was asked for

    @property
    def plain_rate(self) -> float:
        """Tokens per millisecond of plain decoding."""
        return self.texts / self.prices.plain_ms(self.texts)

    @property
    def rate(self) -> float:
        """Tokens per millisecond that are kept up."""
        return self.gain * self.plain_rate

    def passes(self, nodes: int) -> list[float]:
        """[nodes + 1] milliseconds of the pass with 0, 1, 2 ... drafted nodes in it; without any it is one of plain
        decoding, unless prompts are read in it.
        """
        curve = self._curve  # asked for every text of the round
        if not curve:
            mixed_ms = self.prices.pass_ms(self.rows, self.texts)
            is_plain = self.rows == self.texts
            curve.append(min(self.prices.plain_ms(self.texts), mixed_ms) if is_plain else mixed_ms)
        while len(curve) <= nodes:
            curve.append(self.prices.pass_ms(self.rows + len(curve), self.texts))
        return curve[: nodes + 1]

    def draft_ms(self, levels: int, width: int, texts: int) -> float:
        """One text's share of the draft's calls, of `texts` that draft levels of `width`."""
        if not levels:
            return 0.0
        return (self.prices.first_ms(texts) + (levels - 1) * self.prices.level_ms(width * texts)) / texts


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """Candidates of one text, as the chances that they are accepted, descending. `is_fixed`: all of them are taken."""

    chances: Sequence[float]
    is_fixed: bool = False


class RoundPlanner:
    """Shares passes out, by the prices measured on this machine."""

    def __init__(self, costs: Costs) -> None:
        self._prices = PriceList(costs)

    def prompt_tokens(self, unread: Sequence[int]) -> list[int]:
        """How many of the `unread` tokens of each text this pass reads; a text that decodes has one, its root, and
        always gets it. First come, first served; the last chunk of a prompt is never a single token.
        """
        decodes = any(count == 1 for count in unread)
        left = PROMPT_TOKENS_BESIDE if decodes else PROMPT_TOKENS
        shares = []
        for count in unread:
            share = min(count, left) if count > 1 else 1
            if share == count - 1:
                share -= 1
            if share < 2 <= count:
                share = 0
            left -= share if count > 1 else 0
            shares.append(share)
        return shares

    def load(self, paces: Sequence[Pace], contexts: Sequence[int], prompt_tokens: int) -> PassLoad:
        """The pass of S texts with `contexts` tokens in their caches, beside `prompt_tokens` of others' prompts."""
        context = sum(contexts) // len(contexts)
        # What texts gained alone they don't gain together: the others' rows take what cost one text nothing.
        gain = 1 + (speed_gain(paces) - 1) / len(paces)
        return PassLoad(self._prices.at(context), len(paces), prompt_tokens + len(paces), gain)

    def choose(self, load: PassLoad, offers: Sequence[Offer]) -> list[int]:
        """How many of each text's candidates the pass verifies: of all texts' the best, until the next one costs more
        than it brings on the measured curve.
        """
        counts = [len(offer.chances) if offer.is_fixed else 0 for offer in offers]
        fixed = sum(counts)
        pool = [(chance, i) for i, offer in enumerate(offers) if not offer.is_fixed for chance in offer.chances]
        pool.sort(key=lambda one: one[0], reverse=True)  # stable: a text's own order stays
        passes = load.passes(fixed + len(pool))[fixed:]
        best, _ = best_count([chance for chance, _ in pool], passes, load.rate)
        for _, i in pool[:best]:
            counts[i] += 1
        return counts
