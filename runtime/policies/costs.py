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
    """Costs at one context. A drafted round costs `passes[nodes]`, `first`, and `level(width)` for every further level;
    a plain one `plain`. The host's share is in each of them.
    """

    plain: float
    passes: tuple[float, ...]  # [nodes + 1] entry 0 stands for nothing
    first: float
    levels: tuple[float, ...]  # [width + 1]

    def level(self, width: int) -> float:
        """One level of the draft behind the first, `width` rows."""
        return self.levels[min(width, len(self.levels) - 1)]

    def round_ms(self, nodes: int, depth: int, width: int) -> float:
        """A whole round; `depth` 0 asks no draft: plain decoding, or matches in the text."""
        verified = self.passes[min(nodes, len(self.passes) - 1)]
        if depth == 0:
            return verified if nodes > 1 else self.plain
        return verified + self.first + (depth - 1) * self.level(width)


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """The measured tables. `host_*_ms` is the time in neither engine: `host_ms` a drafted round, and what every level
    and every node adds. Raises `UserError` when a table is not what it says.
    """

    contexts: tuple[int, ...]  # [C] tokens in the cache
    nodes: tuple[int, ...]  # [N] root included, from 1
    widths: tuple[int, ...]  # [W] rows of a draft call, from 1
    plain_ms: tuple[float, ...]  # [C] a whole round of plain decoding
    verify_ms: Table  # [C, N] the target's pass in a drafted round
    first_ms: tuple[float, ...]  # [C] the draft's first call, which also reads what was accepted
    level_ms: Table  # [C, W] a further call
    host_ms: float
    host_level_ms: float
    host_node_ms: float

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
        for name in ("host_ms", "host_level_ms", "host_node_ms"):
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
            first=mixed(self.first_ms[low], self.first_ms[high]) + self.host_ms + self.host_level_ms,
            levels=(0.0, *(ms + self.host_level_ms for ms in _every(self.widths, level))),
        )


def _every(points: Sequence[int], values: Sequence[float]) -> list[float]:
    """Values at 1, 2, 3 .. the last of `points`, linear between them."""
    full = [values[0]]
    for (a, va), (b, vb) in itertools.pairwise(zip(points, values, strict=True)):
        full += [va + (vb - va) * step / (b - a) for step in range(1, b - a + 1)]
    assert len(full) == points[-1]
    assert all(map(math.isfinite, full))
    return full


class PriceList:
    """`Costs.at`, kept for contexts that are near one another: it is asked every round."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._found: dict[int, Prices] = {}

    def at(self, context: int) -> Prices:
        """Prices with about `context` tokens in the cache."""
        bucket = context // _BUCKET
        prices = self._found.get(bucket)
        if prices is None:
            prices = self._found[bucket] = self._costs.at(bucket * _BUCKET + _BUCKET // 2)
        return prices
