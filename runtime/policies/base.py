"""How far one tree grows, and what kind of trees a text gets.

A budget answers while a tree grows, and remembers nothing: what is learnt of a text lies in its `Pace`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

from dovetail.runtime.policies.chances import Chances
from dovetail.runtime.trees.shape import TreeShape

PolicyKind = Literal["plain", "lookup", "fixed", "adaptive"]


class TreeBudget(Protocol):
    """How far one tree grows: asked before every level."""

    @property
    def width(self) -> int:
        """Children tried per node, and nodes expanded per level."""
        ...

    def wants_level(self, levels: Sequence[Sequence[float]]) -> bool:
        """Whether to draft another level behind `levels`, the scores of the candidates so far (see `CandidateTree`)."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class DepthBudget:
    """Down to a depth, whatever the scores say."""

    depth: int
    width: int

    def wants_level(self, levels: Sequence[Sequence[float]]) -> bool:
        """See `TreeBudget`."""
        return len(levels) < self.depth


@dataclasses.dataclass(frozen=True, slots=True)
class ChainBudget:
    """As deep as another budget goes, without siblings."""

    budget: TreeBudget

    @property
    def width(self) -> int:
        """One child a node."""
        return 1

    def wants_level(self, levels: Sequence[Sequence[float]]) -> bool:
        """As the other says."""
        return self.budget.wants_level(levels)


PLAIN_TREE = TreeShape(nodes=1, depth=0, width=1)
"""The root alone: plain decoding."""

LOOKUP_TREE = TreeShape(nodes=24, depth=23, width=3)
"""The most that matches in the text make: only where a long match makes it likely."""


def unmeasured_tree(default: TreeShape, branches_cost: bool) -> TreeShape:
    """What a text gets where nothing was measured: the artifact's `default`; where siblings are fed with their whole
    paths, the chain of its depth.
    """
    return TreeShape(default.depth + 1, default.depth, 1) if branches_cost else default


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """What trees the texts of one temperature get.

    `plain` drafts nothing. `lookup` takes matches in the text. `fixed` asks a draft model for `tree`, the same one
    every round; `adaptive` for what earns its price, `tree` at most. Behind a model, matches are taken where they are
    worth more, if the text has a `LookupDraft`.
    """

    kind: PolicyKind
    tree: TreeShape = PLAIN_TREE
    chances: Chances | None = None  # None: the draft's own estimates are believed
    gain: float = 1.0  # over plain decoding, expected before a text says so itself
    is_wish: bool = False  # of the user's own: every text gets the whole tree, priced or not

    @property
    def most_nodes(self) -> int:
        """Drafted nodes of a tree, at most."""
        return 0 if self.kind == "plain" else max(self.tree.nodes, LOOKUP_TREE.nodes) - 1

    def chances_of(self, scores: Sequence[float], least: float = 0.0) -> list[float]:
        """How likely whole paths of these `scores` are accepted; of those with at least `least`."""
        return (self.chances or OWN_ESTIMATES).of(scores, least)


OWN_ESTIMATES = Chances.estimated()
