"""The token tree: node 0 is the last emitted token, every other node a drafted one. No framework.

Letters: N nodes (root included), W rows expanded at a level, K children per row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
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
        path = self.paths()[0]
        return chain(self.tokens[path])

    def paths(self) -> list[list[int]]:
        """The way from the root to every leaf; first the one that always takes the first child.

        root 0 +- 1 +- 3          paths: [0, 1, 3], [0, 1, 4], [0, 2]
               |    +- 4
               +- 2
        """
        children: list[list[int]] = [[] for _ in range(len(self))]
        for node, parent in enumerate(self.parents.tolist()):
            if node:
                children[parent].append(node)
        paths, open_paths = [], [[0]]
        while open_paths:
            path = open_paths.pop()
            while children[path[-1]]:
                first, *others = children[path[-1]]
                open_paths += [[*path, other] for other in reversed(others)]
                path = [*path, first]
            paths.append(path)
        return paths

    def families(self) -> list[dict[int, int]]:
        """[N]: of every node, token -> node of its children. Where siblings repeat a token, the first one counts."""
        families: list[dict[int, int]] = [{} for _ in range(len(self))]
        for node, (token, parent) in enumerate(zip(self.tokens.tolist(), self.parents.tolist(), strict=True)):
            if node:
                families[parent].setdefault(token, node)
        return families


def chain(tokens: Int64s) -> Tree:
    """Tokens [N] one behind the other: a chunk of a prompt, or a draft without alternatives."""
    return Tree(tokens, np.arange(-1, len(tokens) - 1))


def root_only(token: int) -> Tree:
    """The tree of plain decoding: nothing drafted."""
    return Tree(np.array([token], np.int64), np.array([-1], np.int64))


class CandidateTree:
    """Candidates for a round, grown level by level, of which the best are kept (EAGLE-2, Li et al. 2024, arXiv
    2406.16858, sections 4.1 and 4.2).

    A candidate's score is the sum of its log-probabilities from the root, the draft's estimate of the log-probability
    that the whole path is accepted. `frontier` picks which candidates of the newest level to expand, `extend` adds
    their children, `best` makes the tree of the N - 1 best:

        root 7 +- 3 (-0.2) -- 5 (-0.3)        best(2) keeps 3 and 5: siblings compete with descendants
              +- 4 (-1.9)
    """

    # Lists, not arrays: a level has some dozens of candidates, and a numpy call costs as much as ten of them.

    def __init__(self, root: int) -> None:
        self._tokens = [root]
        self._parents = [-1]
        self._scores = [0.0]
        self._begins: list[int] = []  # index of every level's first candidate
        self._ranked: list[int] | None = None  # drafted candidates, the best first

    def __len__(self) -> int:
        """Candidates, the root not counted."""
        return len(self._tokens) - 1

    @property
    def newest(self) -> int:
        """Index of the newest level's first candidate."""
        return self._begins[-1]

    @property
    def depth(self) -> int:
        """Levels so far."""
        return len(self._begins)

    @property
    def levels(self) -> list[list[float]]:
        """The scores of every level's candidates."""
        return [self._scores[begin:end] for begin, end in itertools.pairwise([*self._begins, len(self._scores)])]

    @property
    def scores(self) -> list[float]:
        """Of all candidates, descending."""
        return [self._scores[candidate] for candidate in self.ranked]

    @property
    def ranked(self) -> list[int]:
        """All candidates by descending score. The sort is stable: of equals, a parent comes before its child."""
        if self._ranked is None:
            self._ranked = sorted(range(1, len(self._scores)), key=self._scores.__getitem__, reverse=True)
        return self._ranked

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
        """Add candidates as a new level; returns the first one's index. No step is better than certain: rounding, or a
        draft that is broken, may not put a child above its parent.
        """
        begin = len(self._scores)
        self._begins.append(begin)
        self._tokens += tokens
        self._parents += parents
        self._scores += [self._scores[parent] + min(step, 0.0) for parent, step in zip(parents, log_probs, strict=True)]
        self._ranked = None
        return begin

    def tokens_of(self, candidates: Sequence[int]) -> list[int]:
        """[W] tokens of candidates."""
        return [self._tokens[candidate] for candidate in candidates]

    def path_of(self, candidate: int) -> list[int]:
        """The tokens from the root's first child on the way down to `candidate`; of the root none."""
        path = []
        while candidate:
            path.append(self._tokens[candidate])
            candidate = self._parents[candidate]
        return path[::-1]

    def rows_of(self, candidates: Sequence[int]) -> list[int]:
        """How many rows each of these adds to a pass in which every path is fed from the root on (`Tree.paths`), if
        they come in this order, parents first: one that goes on from a leaf one, any other its whole path.
        """
        rows, inner = [], set[int]()
        for candidate in candidates:
            parent = self._parents[candidate]
            rows.append(len(self.path_of(candidate)) + 1 if parent in inner else 1)
            inner.add(parent)
        return rows

    def parent_of(self, candidate: int) -> int:
        """The candidate before it; 0 is the root."""
        return self._parents[candidate]

    def best(self, count: int) -> Tree:
        """The root and the `count` best candidates. A child never scores above its parent, so they are a tree."""
        return self.tree_of(self.ranked[:count])

    def tree_of(self, candidates: Sequence[int]) -> Tree:
        """The root and these, each with its parent among them or below the root."""
        kept = [0, *sorted(candidates)]
        renumbered = {candidate: node for node, candidate in enumerate(kept)} | {-1: -1}
        parents = [renumbered[self._parents[candidate]] for candidate in kept]
        return Tree(np.array(self.tokens_of(kept), np.int64), np.array(parents, np.int64))
