"""Files damaged at random, as a fuzzer does it, from fixed seeds: cut, with flipped bits, with hostile sizes, with
bytes lost or put in.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dovetail.runtime.errors import UserError

_SIZES = (0, 1, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_SECONDS, _TIMES, _AND_BYTES = 2.0, 12, 8 << 20  # what a damaged file may take: time, memory by its size and besides


def damaged(data: bytes, header: int, seed: int) -> bytes:
    """`data` with damage number `seed`, mostly in its first `header` bytes, where the sizes are."""
    dice = np.random.default_rng(seed)
    out = bytearray(data)
    kind = seed % 6
    limit = header if dice.integers(4) else len(out)
    place = int(dice.integers(limit))
    if kind == 0:
        return bytes(out[:place])
    if kind == 1:
        for _ in range(int(dice.integers(1, 9))):
            out[int(dice.integers(limit))] ^= 1 << int(dice.integers(8))
    elif kind == 2:
        out[place : place + 8] = _SIZES[int(dice.integers(len(_SIZES)))].to_bytes(8, "little")
    elif kind == 3:
        out[place : place + 4] = (_SIZES[int(dice.integers(len(_SIZES)))] & 0xFFFFFFFF).to_bytes(4, "little")
    elif kind == 4:
        del out[place : place + int(dice.integers(1, 64))]
    else:
        out[place:place] = out[place : place + int(dice.integers(1, 64))]
    return bytes(out)


def survives(path: Path, read: Callable[[Path], object]) -> bool:
    """Whether `read` takes the file. Raises for anything but a `UserError` of one line, and for too much time or
    memory.
    """
    size, refusal = path.stat().st_size, ""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        with np.errstate(all="ignore"):  # numbers may be any
            read(path)
    except UserError as error:
        refusal = str(error)
    finally:
        seconds, (_, peak) = time.monotonic() - begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "\n" not in refusal, refusal
    assert len(refusal) < 1000 + len(str(path)), refusal
    assert seconds < _SECONDS, f"{seconds} s"
    assert peak < _TIMES * size + _AND_BYTES, f"{peak} bytes for a file of {size}"
    return not refusal
