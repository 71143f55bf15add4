"""How far a tree grows in each round."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from dovetail.runtime.trees.shape import TreeShape


class Growth(Protocol):
    """How far one tree grows: the draft asks while it drafts.

    Scores are candidates' cumulative log-probabilities from the root (see `TreeBuilder`).
    """

    @property
    def width(self) -> int:
        """Children tried per node, and nodes expanded per level."""
        ...

    @property
    def matches(self) -> Growth | None:
        """How far a tree of matches in the text grows, which is taken in place of the draft's if any is left of it.
        None: the draft alone is asked.
        """
        ...

    def goes_on(self, depth: int, scores: Sequence[float]) -> bool:
        """Whether to draft a level behind the `depth` drafted so far, of whose newest `scores` are the candidates'."""
        ...

    def drafted(self, scores: Sequence[float]) -> int:
        """How many of all candidates to keep; `scores` are theirs, descending."""
        ...


class Policy(Protocol):
    """Decides how each round's tree grows. One text at a time."""

    def begin(self) -> None:
        """Another text begins."""
        ...

    def growth(self, room: int, context: int) -> Growth:
        """For a round that may emit at most `room` >= 1 tokens, with `context` tokens in the target's cache."""
        ...

    def observe(self, accept_length: int) -> None:
        """The round's tree was verified, and this many of its drafted tokens were accepted."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class FixedGrowth:
    """Towards one shape, whatever the scores say."""

    shape: TreeShape

    @property
    def matches(self) -> None:
        """The draft is asked."""
        return None

    @property
    def width(self) -> int:
        """The shape's."""
        return self.shape.width

    def goes_on(self, depth: int, scores: Sequence[float]) -> bool:
        """Down to the shape's depth; not at all for a root alone."""
        return depth < self.shape.depth and self.shape.nodes > 1

    def drafted(self, scores: Sequence[float]) -> int:
        """All but the root."""
        return self.shape.nodes - 1


@dataclasses.dataclass(frozen=True, slots=True)
class ChainGrowth:
    """As deep as another growth goes, without siblings."""

    inner: Growth

    @property
    def width(self) -> int:
        """One child a node."""
        return 1

    @property
    def matches(self) -> Growth | None:
        """Chains, too."""
        return None if self.inner.matches is None else ChainGrowth(self.inner.matches)

    def goes_on(self, depth: int, scores: Sequence[float]) -> bool:
        """As the other says."""
        return self.inner.goes_on(depth, scores)

    def drafted(self, scores: Sequence[float]) -> int:
        """As the other says."""
        return self.inner.drafted(scores)


PLAIN = TreeShape(nodes=1, depth=0, width=1)
"""The root alone: plain decoding."""

NO_GROWTH = FixedGrowth(PLAIN)

LOOKUP_TREE = TreeShape(nodes=24, depth=23, width=3)
"""The most that matches in the text make: only where a long match makes it likely."""


@dataclasses.dataclass(frozen=True, slots=True)
class FixedPolicy:
    """The same tree every round, cut where the text's end leaves less room: a round emits one token more than it
    accepts.
    """

    tree: TreeShape

    def begin(self) -> None:
        """Nothing to forget."""

    def growth(self, room: int, context: int) -> Growth:
        """`tree`, no deeper than `room - 1`."""
        return FixedGrowth(dataclasses.replace(self.tree, depth=min(self.tree.depth, room - 1)))

    def observe(self, accept_length: int) -> None:
        """Nothing to learn."""
