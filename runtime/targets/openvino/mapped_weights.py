"""The target's weights as a file in memory, which OpenVINO reads in place, and once: then it has its own copy.

The CPU plugin repacks every matrix in the first pass that uses it. What it read stays resident, and the weights would
be in memory twice. The pages are unchanged file, so they can be dropped at any time: who still wants one, reads it
again.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino as ov

from dovetail.runtime.errors import ArtifactError

SWEEP_S = 0.02  # between two drops: what a few cores repack in so long is some dozen MB


class MappedWeights:
    """A file of weights, mapped. Keep it as long as a model that was read from `tensor`."""

    def __init__(self, path: Path) -> None:
        """Map `path`. Raises `ArtifactError` for a file that can't be."""
        try:
            with open(path, "rb") as file:
                # `ov.Tensor` takes no read-only memory. A private mapping is writable, and nobody writes.
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: expected a file of weights, got: {error}; export again") from None
        self.tensor = ov.Tensor(np.frombuffer(self._mapping, np.uint8), shared_memory=True)

    def drop(self) -> None:
        """Give all resident pages back. Reading one again brings it back from the file."""
        with contextlib.suppress(OSError):  # memory that the process has locked stays
            self._mapping.madvise(mmap.MADV_DONTNEED)

    @contextlib.contextmanager
    def read_once(self) -> Iterator[None]:
        """While the body runs, drop pages again and again, so that those read so far never add up; and at its end."""
        done = threading.Event()

        def sweep() -> None:
            while not done.wait(SWEEP_S):
                self.drop()

        sweeper = threading.Thread(target=sweep, name="dovetail-weights", daemon=True)
        sweeper.start()
        try:
            yield
        finally:
            done.set()
            sweeper.join()
            self.drop()
