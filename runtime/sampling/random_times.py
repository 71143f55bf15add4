"""The random times of the race that draws tokens: one per output position and token, from the seed alone."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]

_SOONEST = 1e-300  # a time of 0 would make 0 / 0 of a token that can't be drawn


class Race:
    """Exponential times [V] for every output position, made in the order of the positions. Those ahead may be looked at
    before they are needed; those behind the newest one that was forgotten are gone.
    """

    def __init__(self, key: int, vocab_size: int) -> None:
        """Every `key` is a stream of its own (Philox, Salmon et al. 2011)."""
        self._random = np.random.Generator(np.random.Philox(key=key))
        self._vocab_size = vocab_size
        self._first = 0  # position of the first row kept
        self._rows: deque[Times] = deque()

    def times(self, position: int) -> Times:
        """[V] at `position`."""
        assert position >= self._first, "a position that was forgotten"
        while self._first + len(self._rows) <= position:
            self._rows.append(np.maximum(self._random.standard_exponential(self._vocab_size), _SOONEST))
        return self._rows[position - self._first]

    def forget(self, position: int) -> None:
        """Drop the times before `position`."""
        while self._rows and self._first < position:
            self._rows.popleft()
            self._first += 1
