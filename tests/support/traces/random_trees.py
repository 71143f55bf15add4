"""Trees for hypothesis, and the slow obvious way to a node's root."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from dovetail.runtime.trees.tree import Tree


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 24, vocab: int = 50) -> Tree:
    size = draw(st.integers(1, max_nodes))
    parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, size)]
    tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=size, max_size=size))
    return Tree(np.array(tokens, np.int64), np.array(parents, np.int64))


def path_to_root(tree: Tree, node: int) -> list[int]:
    path = []
    while node != -1:
        path.append(node)
        node = int(tree.parents[node])
    return path
