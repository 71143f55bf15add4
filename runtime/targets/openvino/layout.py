"""How steps become rows of a pass: which of them PagedAttention computes in a block, and which alone.

A *subsequence* is what PagedAttention computes together: rows of one text behind what its pages hold. Its kernels sum
in one order where a subsequence has several rows, and in another where it has one (docs/lossless.md). So:

- A chunk of a prompt is one subsequence, of at least two rows.
- A tree is a subsequence for each row. The rows of a chain share the text's pages: all keys of a pass are written
  before any is read, and row i, which sits at slot n + i, sees the slots up to there. A path that leaves the chain is
  fed again from the root, into pages of its own:

      pages of the text    n: root   n+1: a   n+2: b        root - a - b
      pages of the branch  n: root   n+1: c                    \\- c

With acceptance `relaxed` a tree is one subsequence with a mask, and every row is computed as it comes.

Letters: N rows of a subsequence.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dovetail.runtime.trees.shape import MAX_TREE_NODES
from dovetail.runtime.trees.tree import Bools, Int64s

MAX_FILLING = MAX_TREE_NODES  # unread rows of a pass


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one text behind the `past` tokens in its pages: one subsequence, or as many as there are rows."""

    tokens: Int64s  # [N]
    depths: Int64s  # [N] position behind the past
    past: int
    pages: list[int]
    mask: Bools | None = None  # [N, N] who sees whom; None: each sees those before it
    are_alone: bool = False
    is_long: bool = False  # of a text beyond the border of its rotary frequencies

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def subsequences(self) -> int:
        """How many it makes."""
        return len(self.tokens) if self.are_alone else 1


def filling(parts: list[Rows], rows: int, threads: int, pages: list[int]) -> Rows | None:
    """Unread rows, in `pages` of their own, for a pass of `parts` that is to have `rows`; None where none are needed.

    Other kernels run where a pass has one row, and where it has fewer subsequences than threads and each of them is a
    single row. So a pass of few rows gets more: one where that is enough, else two, which are a block.
    """
    fed = sum(map(len, parts))
    wanted = max(rows, fed)
    has_block = any(not part.are_alone for part in parts)
    lacking = 0 if has_block else max(threads, 2) - wanted
    count = min(wanted - fed + min(max(lacking, 0), 2), MAX_FILLING)
    if not count:
        return None
    return Rows(np.zeros(count, np.int64), np.arange(count), 0, pages)
