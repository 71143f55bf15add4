"""The random times of the race that draws tokens: one per output position and token, from the seed alone."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]

_SOONEST = 1e-300  # a time of 0 would make 0 / 0 of a token that can't be drawn
_KEPT_ROWS = 16  # of the positions ahead, at which a draft looks again in the next round


class RandomTimes:
    """Exponential times [V] for every output position. Those of any position may be looked at, in any order."""

    def __init__(self, key: int, vocab_size: int) -> None:
        """Every `key` is a stream of its own (Philox, Salmon et al. 2011), and within it every position."""
        self._key, self._vocab_size = key, vocab_size
        self._rows: OrderedDict[int, Times] = OrderedDict()

    def at(self, position: int) -> Times:
        """[V] at `position`."""
        row = self._rows.get(position)
        if row is None:
            # The highest word of the counter is the position: what a row uses of the lower ones never reaches it.
            random = np.random.Generator(np.random.Philox(key=self._key, counter=position << 192))
            row = self._rows[position] = np.maximum(random.standard_exponential(self._vocab_size), _SOONEST)
            if len(self._rows) > _KEPT_ROWS:
                self._rows.popitem(last=False)
        return row
