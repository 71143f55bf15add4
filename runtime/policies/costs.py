"""What a round costs on one machine, in milliseconds, by nodes, depth, width and context: measured by calibration, read
by the policy.

Letters: C contexts, N node counts, W widths, all ascending.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence

from dovetail.runtime.errors import UserError

Table = tuple[tuple[float, ...], ...]

_LONGEST_MS = 1e7
_BUCKET = 64  # tokens of context that share their prices


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """Costs at one context, in milliseconds, the host's share in each of them; of passes as large as the one before.

    A pass over `rows` rows of several texts costs `pass_ms`; a draft call that reads what was verified `first_ms`, one
    for a further level `level_ms`. With one text, and a tree of 8 nodes grown in 3 levels of 4 rows, a round costs
    `pass_ms(8, 1) + first_ms(1) + 2 * level_ms(4)`; a round of plain decoding `plain_ms(1)`.
    """

    plain: float  # a whole round of plain decoding of one text
    passes: tuple[float, ...]  # [rows + 1] with one text; entry 0 stands for nothing
    text: float  # what every further text adds to a pass of as many rows
    first: float  # one text
    levels: tuple[float, ...]  # [rows + 1]
    shared_plain: tuple[tuple[int, float], ...] = ()  # texts, and a plain round of so many over one of one text
    switch: float = 0.0  # what a pass costs more that has another number of rows than the one before
    branches_cost: bool = True  # see `Costs`

    def pass_ms(self, rows: int, texts: int = 1) -> float:
        """A pass of the target; beyond what was measured, every row adds what the last ones did."""
        return _extended(self.passes, rows) + (texts - 1) * self.text

    def row_ms(self, rows: int) -> float:
        """What a row more costs, about, in a pass of `rows`: the mean of the next eight."""
        return (_extended(self.passes, rows + 8) - _extended(self.passes, rows)) / 8

    def plain_ms(self, texts: int = 1) -> float:
        """A round of plain decoding of so many texts. Behind no draft's call the caches are warm: it costs less than a
        pass of as many rows among drafted rounds.
        """
        if not self.shared_plain:
            return self.pass_ms(texts, texts) - self.passes[1] + self.plain
        points = [(1, 1.0), *self.shared_plain]
        high = next((i for i, (count, _) in enumerate(points) if count >= texts), len(points) - 1)
        (count, ratio), (last, last_ratio) = points[max(high - 1, 0)], points[high]
        slope = (last_ratio - ratio) / (last - count) if last > count else 0.0
        return self.plain * (ratio + slope * (texts - count))

    def level_ms(self, rows: int) -> float:
        """A call for one level behind the first, of so many candidates over all texts."""
        return _extended(self.levels, rows)

    def first_ms(self, texts: int = 1) -> float:
        """The call that reads what was verified of so many texts."""
        return self.first + self.level_ms(texts) - self.level_ms(1)


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """The measured tables. `host_*_ms` is the time in neither engine: `host_ms` a drafted round, and what every level
    and every node adds. Raises `UserError` when a table is not what it says.
    """

    contexts: tuple[int, ...]  # [C] tokens in the cache
    nodes: tuple[int, ...]  # [N] rows of a pass, roots included, from 1
    widths: tuple[int, ...]  # [W] rows of a draft call, from 1
    plain_ms: tuple[float, ...]  # [C] a whole round of plain decoding
    verify_ms: Table  # [C, N] the target's pass in a drafted round
    first_ms: tuple[float, ...]  # [C] the draft's first call, which also reads what was accepted
    level_ms: Table  # [C, W] a further call
    text_ms: tuple[float, ...]  # [C] what every further text adds to a pass of as many rows
    host_ms: float
    host_level_ms: float
    host_node_ms: float
    shared_texts: tuple[int, ...] = ()  # numbers of texts, from 2, whose plain rounds were timed
    shared_plain: tuple[float, ...] = ()  # such a round over one of one text
    switch_ms: float = 0.0  # what a pass costs more that has another number of rows than the one before
    branches_cost: bool = True  # whether a node's siblings are fed with their whole paths (acceptance `confirmed`)

    def __post_init__(self) -> None:
        for name, first in (("contexts", None), ("nodes", 1), ("widths", 1)):
            values = getattr(self, name)
            ascending = all(a < b for a, b in itertools.pairwise(values))
            if not values or not ascending or values[0] < 1 or values[-1] > 1 << 24 or first not in (None, values[0]):
                raise UserError(f"costs.{name}: expected whole numbers, ascending from 1, got {values!r:.60}")
        shapes = {"plain_ms": None, "first_ms": None, "verify_ms": self.nodes, "level_ms": self.widths}
        for name, columns in shapes.items():
            rows = getattr(self, name)
            good = len(rows) == len(self.contexts)
            cells = rows if columns is None else [cell for row in rows for cell in row]
            good = good and (columns is None or all(len(row) == len(columns) for row in rows))
            if not good or not all(0 < cell < _LONGEST_MS for cell in cells):
                raise UserError(f"costs.{name}: expected a positive time per context and column, got {rows!r:.60}")
        if len(self.text_ms) != len(self.contexts) or not all(0 <= ms < _LONGEST_MS for ms in self.text_ms):
            raise UserError(f"costs.text_ms: expected a time from 0 per context, got {self.text_ms!r:.60}")
        good = all(1 < a < b for a, b in itertools.pairwise((*self.shared_texts, 1 << 24)))
        if not good or len(self.shared_texts) != len(self.shared_plain):
            raise UserError(f"costs.shared_texts: expected numbers from 2, ascending, got {self.shared_texts!r:.60}")
        if not all(0 < ratio < _LONGEST_MS for ratio in self.shared_plain):
            raise UserError(f"costs.shared_plain: expected positive ratios, got {self.shared_plain!r:.60}")
        for name in ("host_ms", "host_level_ms", "host_node_ms", "switch_ms"):
            if not 0 <= getattr(self, name) < _LONGEST_MS:
                raise UserError(f"costs.{name}: expected a time from 0, got {getattr(self, name)!r:.40}")

    def at(self, context: int) -> Prices:
        """Prices with `context` tokens in the cache: linear between the measured points, level outside them."""
        high = min(max(bisect.bisect_left(self.contexts, context), 1), len(self.contexts) - 1)
        low = max(high - 1, 0)
        span = self.contexts[high] - self.contexts[low]
        share = min(max((context - self.contexts[low]) / span, 0.0), 1.0) if span else 0.0

        def mixed(a: float, b: float) -> float:
            return a + share * (b - a)

        verify = [mixed(a, b) for a, b in zip(self.verify_ms[low], self.verify_ms[high], strict=True)]
        level = [mixed(a, b) for a, b in zip(self.level_ms[low], self.level_ms[high], strict=True)]
        passes = _every(self.nodes, verify)
        return Prices(
            plain=mixed(self.plain_ms[low], self.plain_ms[high]),
            passes=(0.0, *(ms + self.host_node_ms * count for count, ms in enumerate(passes, 1))),
            text=mixed(self.text_ms[low], self.text_ms[high]),
            first=mixed(self.first_ms[low], self.first_ms[high]) + self.host_ms + self.host_level_ms,
            levels=(0.0, *(ms + self.host_level_ms for ms in _every(self.widths, level))),
            shared_plain=tuple(zip(self.shared_texts, self.shared_plain, strict=True)),
            switch=self.switch_ms,
            branches_cost=self.branches_cost,
        )


def _extended(values: Sequence[float], index: int) -> float:
    """`values[index]`, of which entry 0 stands for nothing; beyond the last, on the line of the last half."""
    last = len(values) - 1
    if index <= last:
        return values[index]
    middle = max(last // 2, 1)
    slope = (values[last] - values[middle]) / (last - middle) if last > middle else 0.0
    return values[last] + slope * (index - last)


def _every(points: Sequence[int], values: Sequence[float]) -> list[float]:
    """Values at 1, 2, 3 .. the last of `points`, linear between them."""
    full = [values[0]]
    for (a, va), (b, vb) in itertools.pairwise(zip(points, values, strict=True)):
        full += [va + (vb - va) * step / (b - a) for step in range(1, b - a + 1)]
    assert len(full) == points[-1]
    assert all(map(math.isfinite, full))
    return full


ASSUMED = Costs(
    contexts=(1,),
    nodes=(1, 8, 128),
    widths=(1, 8, 32),
    plain_ms=(1.0,),
    verify_ms=((1.0, 1.2, 8.0),),
    first_ms=(0.1,),
    level_ms=((0.08, 0.12, 0.4),),
    text_ms=(0.0,),
    host_ms=0.0,
    host_level_ms=0.0,
    host_node_ms=0.0,
    switch_ms=0.1,
)
"""Where nothing was measured, in passes of plain decoding: eight rows cost a fifth more than one, a draft call a tenth.
So one text gets the tree that its artifact names, several texts share the rows that cost little, and a draft that
brings less than a third of a token a round is put to rest.
"""


class PriceList:
    """`Costs.at`, kept for contexts that are near one another: it is asked every round."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._prices: dict[int, Prices] = {}

    def at(self, context: int) -> Prices:
        """Prices with about `context` tokens in the cache."""
        bucket = context // _BUCKET
        prices = self._prices.get(bucket)
        if prices is None:
            prices = self._prices[bucket] = self._costs.at(bucket * _BUCKET + _BUCKET // 2)
        return prices
