"""Rows of a draft graph's caches, shared by all texts of the graph. Plain Python, no arrays.

Blocks of rows are handed out lowest first, so that the rows in use lie close together: a call reads the caches up to
the last row that any of its texts uses.
"""

from __future__ import annotations

import heapq

from dovetail.runtime.errors import CacheFullError

ROWS_A_BLOCK = 64


class RowPool:
    """Hands out blocks of rows, up to `max_rows`."""

    def __init__(self, max_rows: int) -> None:
        self.max_blocks = -(-max_rows // ROWS_A_BLOCK)
        self._returned: list[int] = []  # a heap
        self._begun = 0  # blocks that were ever handed out

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self.max_blocks - self._begun + len(self._returned)

    def take(self) -> int:
        """The lowest free block. Raises `CacheFullError`."""
        if self._returned:
            return heapq.heappop(self._returned)
        if self._begun == self.max_blocks:
            raise CacheFullError(f"expected a free block of the draft's {self.max_blocks}, got none")
        self._begun += 1
        return self._begun - 1

    def give_back(self, block: int) -> None:
        """A block from `take`."""
        assert block < self._begun
        assert block not in self._returned, "a block was given back twice"
        heapq.heappush(self._returned, block)


class RowTable:
    """The rows of one text, in its own order."""

    def __init__(self, pool: RowPool) -> None:
        self._pool = pool
        self._blocks: list[int] = []

    def reserve(self, count: int) -> None:
        """Make sure that the first `count` rows are there. Raises `CacheFullError`, changing nothing."""
        lacking = -(-count // ROWS_A_BLOCK) - len(self._blocks)
        if lacking > self._pool.num_free:
            raise CacheFullError(f"expected {lacking} free blocks of rows for the draft, got {self._pool.num_free}")
        for _ in range(lacking):
            self._blocks.append(self._pool.take())

    def rows(self, begin: int, end: int) -> list[int]:
        """Where the rows from `begin` to `end` of this text lie in the pool."""
        blocks = self._blocks
        return [blocks[i // ROWS_A_BLOCK] * ROWS_A_BLOCK + i % ROWS_A_BLOCK for i in range(begin, end)]

    def release(self, count: int) -> None:
        """Give back what lies wholly behind the first `count` rows."""
        kept = -(-count // ROWS_A_BLOCK)
        while len(self._blocks) > kept:
            self._pool.give_back(self._blocks.pop())
