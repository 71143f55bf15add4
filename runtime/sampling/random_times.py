"""The random times of the race that draws tokens: one per output position and token, from the seed alone."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


class RandomTimes:
    """Exponential times of V tokens at every output position. Those of any may be looked at, in any order."""

    def __init__(self, key: int, vocab_size: int) -> None:
        """Every `key` has times of its own."""
        self._key, self._vocab_size = key, vocab_size

    def at(self, position: int) -> PositionTimes:
        """Those at `position`."""
        digest = hashlib.blake2b(f"{self._key} {position}".encode(), digest_size=24).digest()
        first, first_token, start = struct.unpack("<3Q", digest)
        earliest = -math.log(_fraction(first)) / self._vocab_size
        return PositionTimes(earliest, first_token * self._vocab_size >> 64, start)


@dataclasses.dataclass(frozen=True, slots=True)
class PositionTimes:
    """Independent exponential times of V tokens, computed for those alone that are asked for.

    The earliest of V such times is exponential, too, V times as short, and any token's with the same chance. What the
    others take beyond it is exponential again: such times have no memory. So the earliest is drawn before all others,
    and a race can leave out everybody who would lose even with it.
    """

    earliest: float
    first_token: int  # whose that is
    start: int  # of the stream in which the others' numbers lie

    def of(self, tokens: npt.NDArray[np.integer[Any]]) -> Times:
        """Those of `tokens`, in their shape; none is 0 or infinite."""
        # SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"): any of its numbers
        # comes at once.
        bits = tokens.astype(np.uint64)
        bits *= 0x9E3779B97F4A7C15
        bits += self.start
        bits ^= bits >> 30
        bits *= 0xBF58476D1CE4E5B9
        bits ^= bits >> 27
        bits *= 0x94D049BB133111EB
        bits ^= bits >> 31
        times: Times = self.earliest - np.log(_fraction(bits))
        times[tokens == self.first_token] = self.earliest
        return times


def _fraction(bits: Any) -> Any:
    """Of 64 random bits, evenly between 0 and 1 and neither of them."""
    return ((bits >> 12) + 0.5) * 2.0**-52
