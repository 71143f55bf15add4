"""How fast this machine reads memory: the limit that a pass over a model's weights cannot beat."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.cpu import available_memory

_MIN_BYTES, _MAX_BYTES = 256 << 20, 2 << 30
_CACHES = 8  # times larger than the last-level cache: less than an eighth of a pass can be served by it

Array = NDArray[Any]
KERNELS: dict[str, Callable[[Array], object]] = {
    # Reductions that numpy vectorises and that release the interpreter's lock; which is fastest differs by machine.
    "bitwise_or of int64": np.bitwise_or.reduce,
    "add of int64": np.add.reduce,
    "max of int64": np.maximum.reduce,
    "max of float32": lambda a: np.maximum.reduce(a.view(np.float32)),
    "add of float64": lambda a: np.add.reduce(a.view(np.float64)),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Bandwidth:
    """What was measured, and how. `gb_per_s` counts 1e9 bytes."""

    gb_per_s: float
    kernel: str
    threads: int
    array_bytes: int
    repeats: int


def measure_bandwidth(threads: int, *, array_bytes: int | None = None, repeats: int = 5) -> Bandwidth:
    """Read an array much larger than the caches with `threads` threads, a contiguous part each; the best of
    `repeats` passes of the best of several kernels. About two seconds.

    `array_bytes` defaults to eight times the last-level cache, from 256 MiB to 2 GiB and at most a quarter of the
    memory that is free. Raises `UserError` where not even the least is.
    """
    if array_bytes is None:
        wanted = min(_MAX_BYTES, max(_MIN_BYTES, _CACHES * _last_level_cache_bytes()))
        array_bytes = min(wanted, available_memory() // 4)
        if array_bytes < _MIN_BYTES // 4:
            raise UserError(
                f"expected {_MIN_BYTES >> 20} MiB of free memory to measure its bandwidth, got "
                f"{4 * array_bytes >> 20} MiB; close something"
            )
    parts = np.array_split(np.ones(array_bytes // 8, np.int64), threads)  # written, so that the pages are real
    size = sum(part.nbytes for part in parts)
    best, fastest = 0.0, ""
    for name, kernel in KERNELS.items():
        for _ in range(repeats):
            speed = size / _seconds(kernel, parts) / 1e9
            if speed > best:
                best, fastest = speed, name
    return Bandwidth(best, fastest, threads, size, repeats)


def _seconds(kernel: Callable[[Array], object], parts: list[Array]) -> float:
    """From the start of all threads to the end of the last."""
    barrier = threading.Barrier(len(parts) + 1)

    def work(part: Array) -> None:
        barrier.wait()
        kernel(part)

    workers = [threading.Thread(target=work, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def _last_level_cache_bytes() -> int:
    """The largest cache the kernel tells of; 32 MiB where it tells none."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if size:
            sizes.append(int(size[1]) << {"K": 10, "M": 20}[size[2]])
    return max(sizes, default=32 << 20)
