"""A weight as it lies in a file: mapped, read when it is asked for, as float32 or in the blocks that it is stored in.

Letters: R rows, I inputs (the last axis).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, by the name that transformers gives it.

    `kind` is how it is stored, in the words of its file: `F32`, `F16`, `BF16`, `F8_E4M3`, or a GGUF block type such as
    `Q4_1`. `raw` is mapped from the file: numbers of that type in `shape`, or of a block type bytes [R, bytes a row].
    `to_float` makes float32 numbers of rows of `raw`; its second argument is the number of the first of
    them. `rows` is another order of the rows (llama.cpp
    interleaves the rotary halves of queries and keys), `shift` is added to every number (Gemma's norms lie in a GGUF as
    1 + w).
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    raw: NDArray[Any]
    to_float: Callable[[NDArray[Any], int], Matrix]
    rows: NDArray[np.int64] | None = None
    shift: float = 0.0

    def read(self) -> Matrix:
        """All numbers, in `shape`, as float32."""
        if 0 in self.shape:
            return np.empty(self.shape, np.float32)
        return self.read_rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> Matrix:
        """The rows from `start` to before `stop`, as float32: a part of a matrix that need not be in memory whole."""
        part = slice(start, stop)
        raw = self.raw[part if self.rows is None else self.rows[part]] if self.shape else self.raw
        values = np.ascontiguousarray(self.to_float(raw, start), np.float32).reshape(-1, *self.shape[1:])
        return values + np.float32(self.shift) if self.shift else values

    def look_up(self, rows: NDArray[np.int64]) -> Matrix:
        """Some rows of a matrix, in any order, as float32: of an embedding, say, which has no scales beside it."""
        places = rows if self.rows is None else self.rows[rows]
        return np.ascontiguousarray(self.to_float(self.raw[places], 0), np.float32) + np.float32(self.shift)

    @property
    def has_blocks(self) -> bool:
        """Whether `raw` are blocks of quantised weights, as a GGUF has them."""
        return self.raw.dtype == np.uint8 and self.raw.ndim == 2 and self.kind.startswith(("Q", "IQ", "MXFP", "TQ"))

    def blocks(self) -> NDArray[np.uint8]:
        """The bytes of a GGUF block type, [R, bytes a row], in the order of `read`'s rows."""
        assert self.has_blocks, f"{self.kind} has no blocks"
        return self.raw if self.rows is None else self.raw[self.rows]
