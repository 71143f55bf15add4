"""How far a tree grows in each round."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from dovetail.runtime.manifest import TreeShape


class Policy(Protocol):
    """Decides the next tree's shape."""

    def shape(self, room: int) -> TreeShape:
        """The shape for a round that may emit at most `room` >= 1 tokens."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class FixedPolicy:
    """The same tree every round, cut where the text's end leaves less room: a round emits one token more than it
    accepts.
    """

    tree: TreeShape

    def shape(self, room: int) -> TreeShape:
        """`tree`, no deeper than `room - 1`."""
        depth = min(self.tree.depth, room - 1)
        return self.tree if depth == self.tree.depth else dataclasses.replace(self.tree, depth=depth)
