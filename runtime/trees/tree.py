"""The token tree: node 0 is the last emitted token, every other node a drafted one. No framework.

Letters: N nodes (root included), W rows expanded at a level, K children per row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer[Any]]
Float32s = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """Tokens and parents of N nodes; `parents[0] == -1` and every parent comes before its children."""

    tokens: Int64s  # [N]
    parents: Int64s  # [N]

    def __post_init__(self) -> None:
        root, *others = self.parents.tolist()
        assert root == -1
        assert len(self.parents) == len(self.tokens)
        assert all(0 <= parent < node for node, parent in enumerate(others, 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self) -> Bools:
        """[N, N]: row i is true at i and at every node on the way from i to the root: what node i attends to."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents.tolist()):
            if node:
                mask[node] |= mask[parent]
        return mask

    def depths(self) -> Int64s:
        """[N]: edges from the root."""
        depths = [0]
        for parent in self.parents.tolist()[1:]:
            depths.append(depths[parent] + 1)
        return np.array(depths, np.int64)

    def is_chain(self) -> bool:
        """Whether no node has a sibling."""
        return bool(self.parents.tolist() == list(range(-1, len(self) - 1)))

    def first_chain(self) -> Tree:
        """The root, its first child, that one's first child, and so on."""
        path = [0]
        for node in range(1, len(self)):
            if self.parents[node] == path[-1]:
                path.append(node)
        return Tree(self.tokens[path], np.arange(-1, len(path) - 1))

    def families(self) -> list[dict[int, int]]:
        """[N]: of every node, token -> node of its children. Where siblings repeat a token, the first one counts."""
        families: list[dict[int, int]] = [{} for _ in range(len(self))]
        for node, (token, parent) in enumerate(zip(self.tokens.tolist(), self.parents.tolist(), strict=True)):
            if node:
                families[parent].setdefault(token, node)
        return families


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

    # Lists, not arrays: a level has some dozens of candidates, and a numpy call costs as much as ten of them.

    def __init__(self, root: int) -> None:
        self._tokens = [root]
        self._parents = [-1]
        self._scores = [0.0]
        self.newest = 0  # index of the newest level's first candidate

    @property
    def newest_scores(self) -> list[float]:
        """Of the newest level's candidates."""
        return self._scores[self.newest :]

    def frontier(self, width: int) -> list[int]:
        """[W <= width]: the best candidates of the newest level, in the order of their index."""
        level = range(self.newest, len(self._scores))
        return sorted(sorted(level, key=self._scores.__getitem__, reverse=True)[:width])

    def extend(
        self, expanded: Sequence[int], tokens: Sequence[Sequence[int]], log_probs: Sequence[Sequence[float]]
    ) -> None:
        """Add the children `tokens` [W][K] with `log_probs` [W][K] of the candidates `expanded` [W]."""
        parents = [parent for parent, row in zip(expanded, tokens, strict=True) for _ in row]
        self.add_level(parents, [*itertools.chain(*tokens)], [*itertools.chain(*log_probs)])

    def add_level(self, parents: Sequence[int], tokens: Sequence[int], log_probs: Sequence[float]) -> int:
        """Add candidates as a new level; returns the first one's index."""
        self.newest = len(self._scores)
        self._tokens += tokens
        self._parents += parents
        self._scores += [self._scores[parent] + step for parent, step in zip(parents, log_probs, strict=True)]
        return self.newest

    def tokens_of(self, candidates: Sequence[int]) -> list[int]:
        """[W] tokens of candidates."""
        return [self._tokens[candidate] for candidate in candidates]

    def best(self, how_many: Callable[[Sequence[float]], int]) -> Tree:
        """The root and the best candidates: as many as `how_many` says, given all their scores, descending.

        A child never scores above its parent, and the stable sort puts a parent before a child of the same score, so
        the kept set is a tree.
        """
        drafted = sorted(range(1, len(self._scores)), key=self._scores.__getitem__, reverse=True)
        kept = [0, *sorted(drafted[: how_many([self._scores[candidate] for candidate in drafted])])]
        renumbered = {candidate: node for node, candidate in enumerate(kept)} | {-1: -1}
        parents = [renumbered[self._parents[candidate]] for candidate in kept]
        return Tree(np.array(self.tokens_of(kept), np.int64), np.array(parents, np.int64))
