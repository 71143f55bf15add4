"""The size of a tree, as a user, an artifact or calibration names it."""

from __future__ import annotations

import dataclasses

from dovetail.runtime.artifact.strict_json import shown
from dovetail.runtime.errors import UserError
from dovetail.runtime.settings import plain

MAX_TREE_NODES = 128  # also the room that a cache keeps beyond its text, for the last tree


@dataclasses.dataclass(frozen=True, slots=True)
class TreeShape:
    """How far a tree grows: `nodes` with the root, `depth` drafted levels, `width` children tried per node."""

    nodes: int
    depth: int
    width: int

    def __post_init__(self) -> None:
        for name, low, high in (("nodes", 1, MAX_TREE_NODES), ("depth", 0, 64), ("width", 1, 64)):
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if type(value) is not int or not low <= value <= high:
                raise UserError(
                    f"tree {name}: expected an integer from {low} to {high}, got {shown(value)}; correct it"
                )
