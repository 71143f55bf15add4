"""How many rows passes have: few sizes, because another size than the pass before had costs extra.

OpenVINO prepares its graph anew for every number of rows, which takes longer than to compute some rows that nobody
reads (docs/log.md). When to change is the question of whether to rent or to buy without knowing for how long. The
answer here: what another size would have brought is summed up round by round, and the change is made when the sum
exceeds its price; a sum that falls below nothing begins again (Page 1954, continuous inspection schemes).
"""

from __future__ import annotations

from collections.abc import Mapping

_EVERY = 8  # sizes up to here are all used
_STEPS = 4  # and this many between a power of two and the next


def sizes(least: int, most: int) -> list[int]:
    """The sizes of a pass that needs `least` rows and has use for `most`, ascending."""
    found, size, step = [least], 1, 1
    while found[-1] < most:
        size += step
        if size >= _EVERY and size & (size - 1) == 0:
            step = size // _STEPS
        if size > least:
            found.append(size)
    return found


class PassSize:
    """The size that is kept, and what others would have brought since it is."""

    def __init__(self) -> None:
        self.rows: int | None = None  # None: the next pass has another size than the last in any case
        self._missed: dict[int, float] = {}

    def choose(self, gains: Mapping[int, float], price: float) -> int:
        """One of the sizes in `gains`, which says what each would bring this round; a change costs `price`."""
        best = max(gains, key=lambda size: (gains[size], -size))
        if self.rows is None or self.rows not in gains:
            return self._keep(best)
        for size, gain in gains.items():
            self._missed[size] = max(self._missed.get(size, 0.0) + gain - gains[self.rows], 0.0)
        wanted = max(gains, key=lambda size: (self._missed[size], -size))
        return self._keep(wanted) if self._missed[wanted] > price else self.rows

    def forget(self) -> None:
        """A pass of another kind comes between."""
        self.rows = None

    def _keep(self, rows: int) -> int:
        self.rows = rows
        self._missed = {}
        return rows
