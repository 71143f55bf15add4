"""The token tree: node 0 is the last emitted token, every other node a drafted one. Pure numpy.

Letters: N nodes (root included), W rows expanded at a level, K children per row.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """Tokens and parents of N nodes; `parents[0] == -1` and every parent comes before its children."""

    tokens: Int64s  # [N]
    parents: Int64s  # [N]

    def __post_init__(self) -> None:
        n = len(self.tokens)
        assert n >= 1
        assert self.parents.shape == (n,)
        assert self.parents[0] == -1
        assert np.all((self.parents[1:] >= 0) & (self.parents[1:] < np.arange(1, n)))

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self) -> Bools:
        """[N, N]: row i is true at i and at every node on the way from i to the root: what node i attends to."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node in range(1, len(self)):
            mask[node] |= mask[self.parents[node]]
        return mask

    def depths(self) -> Int64s:
        """[N]: edges from the root."""
        depths = np.zeros(len(self), np.int64)
        for node in range(1, len(self)):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    def children(self, node: int) -> dict[int, int]:
        """Token -> node of the children of `node`. Where siblings repeat a token, the first one counts."""
        found = np.flatnonzero(self.parents == node)[::-1]
        return dict(zip(self.tokens[found].tolist(), found.tolist(), strict=True))


def root_only(token: int) -> Tree:
    """The tree of plain decoding: nothing drafted."""
    return Tree(np.array([token], np.int64), np.array([-1], np.int64))


class TreeBuilder:
    """Grows candidates level by level and keeps the best (EAGLE-2, Li et al. 2024, arXiv 2406.16858, sections 4.1 and
    4.2).

    A candidate's score is the sum of its log-probabilities from the root, the draft's estimate of the log-probability
    that the whole path is accepted. `frontier` picks which candidates of the newest level to expand, `extend` adds
    their children, `best` keeps the N-1 best.
    """

    def __init__(self, root: int) -> None:
        self._tokens = [np.array([root], np.int64)]
        self._parents = [np.array([-1], np.int64)]
        self._scores = [np.zeros(1, np.float32)]
        self.newest = 0  # index of the newest level's first candidate
        self._count = 1

    def frontier(self, width: int) -> Int64s:
        """[W <= width]: the best candidates of the newest level, in the order of their index."""
        scores = self._scores[-1]
        best = np.argsort(-scores, kind="stable")[:width]
        return np.sort(best) + self.newest

    def extend(self, expanded: Int64s, tokens: Int64s, log_probs: Float32s) -> None:
        """Add the children `tokens` [W, K] with `log_probs` [W, K] of the candidates `expanded` [W]."""
        scores = np.concatenate(self._scores)[expanded, None] + log_probs  # [W, K]
        self.newest = self._count
        self._tokens.append(tokens.ravel())
        self._parents.append(np.repeat(expanded, tokens.shape[1]))
        self._scores.append(scores.ravel().astype(np.float32))
        self._count += tokens.size

    def tokens_of(self, candidates: Int64s) -> Int64s:
        """Tokens of candidates."""
        return np.concatenate(self._tokens)[candidates]

    def best(self, nodes: int) -> Tree:
        """The root and the `nodes - 1` best candidates.

        A child never scores above its parent, and the stable sort puts a parent before a child of the same score, so
        the kept set is a tree.
        """
        scores, parents = np.concatenate(self._scores), np.concatenate(self._parents)
        scores[0] = np.inf
        kept = np.sort(np.argsort(-scores, kind="stable")[:nodes])
        renumbered = np.full(len(scores), -1, np.int64)
        renumbered[kept] = np.arange(len(kept))
        new_parents = renumbered[parents[kept]]
        new_parents[0] = -1
        return Tree(np.concatenate(self._tokens)[kept], new_parents)
