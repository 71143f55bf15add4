"""What one pass over the weights is filled with: tokens of prompts, and the nodes of all texts' trees.

Letters: S texts that decode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dovetail.runtime.decoding.pass_size import PassSize, sizes
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
    kept_rows: int = 0  # that the pass has in any case, prompts not counted: those of the pass before
    _curve: list[float] = dataclasses.field(default_factory=list, compare=False)  # `passes`, as far as it was asked for

    @property
    def plain_rate(self) -> float:
        """Tokens per millisecond of plain decoding."""
        return self.texts / self.prices.plain_ms(self.texts)

    @property
    def rate(self) -> float:
        """Tokens per millisecond that are kept up."""
        return self.gain * self.plain_rate

    @property
    def prompt_rows(self) -> int:
        """Tokens of others' prompts."""
        return self.rows - self.texts

    def pass_ms(self, decoding_rows: int) -> float:
        """The pass with so many rows beside the prompts'; one of plain decoding, where these are the roots alone and no
        prompt is read.
        """
        mixed_ms = self.prices.pass_ms(self.prompt_rows + decoding_rows, self.texts)
        is_plain = not self.prompt_rows and decoding_rows == self.texts
        return min(self.prices.plain_ms(self.texts), mixed_ms) if is_plain else mixed_ms

    @property
    def plain_ms(self) -> float:
        """The pass without any node."""
        return self.pass_ms(self.texts)

    def passes(self, rows: int) -> list[float]:
        """[rows + 1] milliseconds of the pass with 0, 1, 2 ... rows of drafted nodes in it."""
        curve = self._curve  # asked for every text of the round
        while len(curve) <= rows:
            curve.append(self.pass_ms(max(self.texts + len(curve), self.kept_rows)))
        return curve[: rows + 1]

    def draft_ms(self, levels: int, width: int, texts: int) -> float:
        """One text's share of the draft's calls, of `texts` that draft levels of `width`."""
        if not levels:
            return 0.0
        return (self.prices.first_ms(texts) + (levels - 1) * self.prices.level_ms(width * texts)) / texts


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """Candidates of one text in the order in which they may be taken: the chances that they are accepted, and the rows
    that each adds to the pass. `is_fixed`: all of them are taken.
    """

    chances: Sequence[float]
    rows: Sequence[int]
    is_fixed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Filling:
    """How many candidates of each text a pass verifies, and what it costs."""

    counts: list[int]
    ms: float


class RoundPlanner:
    """Shares passes out, by the prices measured on this machine. It remembers how large the last pass was."""

    def __init__(self, costs: Costs, *, keeps_size: bool = True) -> None:
        """Without `keeps_size` a pass has the rows that it needs, whatever the one before had."""
        self._keeps_size = keeps_size
        self._prices = PriceList(costs)
        self._size = PassSize()
        self._prompt_rows = 0  # of the last pass
        self.size = 0  # rows of the pass that was chosen last, prompts not counted

    def prompt_tokens(self, readable: Sequence[int]) -> list[int]:
        """How many of the `readable` tokens of each text this pass reads; a text that decodes has none. First come,
        first served.
        """
        left = PROMPT_TOKENS if all(readable) else PROMPT_TOKENS_BESIDE
        shares = []
        for count in readable:
            shares.append(min(count, left))
            left -= shares[-1]
        return shares

    def load(self, paces: Sequence[Pace], contexts: Sequence[int], prompt_tokens: int) -> PassLoad:
        """The pass of S texts with `contexts` tokens in their caches, beside `prompt_tokens` of others' prompts."""
        context = sum(contexts) // len(contexts)
        # What texts gained alone they don't gain together: the others' rows take what cost one text nothing.
        gain = 1 + (speed_gain(paces) - 1) / len(paces)
        if prompt_tokens != self._prompt_rows or not self._keeps_size:
            self._size.forget()
            self._prompt_rows = prompt_tokens
        return PassLoad(self._prices.at(context), len(paces), prompt_tokens + len(paces), gain, self._size.rows or 0)

    def forget_size(self) -> None:
        """A pass without decoding texts comes between."""
        self._size.forget()

    def choose(self, load: PassLoad, offers: Sequence[Offer]) -> Filling:
        """How many of each text's candidates the pass verifies: of all texts' the best, until the next one costs more
        than it brings on the measured curve, where a pass of the size of the last one costs least.
        """
        counts = [len(offer.chances) if offer.is_fixed else 0 for offer in offers]
        least = load.texts + sum(sum(offer.rows) for offer in offers if offer.is_fixed)
        pool = [
            (chance, i, rows)
            for i, offer in enumerate(offers)
            if not offer.is_fixed
            for chance, rows in zip(offer.chances, offer.rows, strict=True)
        ]
        pool.sort(key=lambda one: one[0], reverse=True)  # stable: a text's own order stays
        wanted = sizes(least, least + sum(rows for _, _, rows in pool))
        kept = self._size.rows
        if kept is not None and kept > least:
            wanted = sorted({*wanted, kept})
        gains, taken, needed = dict[int, float](), dict[int, int](), least
        tokens, place = 0.0, 0
        for size in wanted:
            while place < len(pool) and needed + pool[place][2] <= size:
                tokens += pool[place][0]
                needed += pool[place][2]
                place += 1
            taken[size] = place
            gains[size] = tokens - load.rate * load.pass_ms(size)
        self.size = self._size.choose(gains, load.rate * load.prices.switch)
        for _, i, _ in pool[: taken[self.size]]:
            counts[i] += 1
        return Filling(counts, load.pass_ms(self.size) + (load.prices.switch if kept != self.size else 0.0))
