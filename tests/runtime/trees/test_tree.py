"""Proves that trees are trees: masks, depths and children against slow obvious versions, that reranking keeps the
best connected set, and that candidates know their levels, ranks and paths.
"""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from random_trees import path_to_root, trees

from dovetail.runtime.trees.tree import CandidateTree, Tree


@given(trees())
def test_mask_and_depth_follow_the_parents(tree: Tree) -> None:
    mask, depths = tree.ancestors(), tree.depths()
    for node in range(len(tree)):
        path = path_to_root(tree, node)
        assert sorted(path) == np.flatnonzero(mask[node]).tolist()
        assert depths[node] == len(path) - 1


@given(trees(vocab=4))
def test_children_maps_each_token_to_its_first_child(tree: Tree) -> None:
    for node in range(len(tree)):
        expected: dict[int, int] = {}
        for child in range(1, len(tree)):
            if tree.parents[child] == node:
                expected.setdefault(int(tree.tokens[child]), child)
        assert tree.families()[node] == expected


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 5), st.integers(1, 40))
def test_best_keeps_the_highest_scores_and_their_parents(seed: int, width: int, depth: int, nodes: int) -> None:
    rng = np.random.default_rng(seed)
    candidates = CandidateTree(99)
    parents, tokens, scores = [-1], [99], [0.0]

    def grow(expanded: list[int]) -> None:
        children = rng.integers(0, 90, (len(expanded), width))
        # Half the draws are multiples of 1/4, so that equal scores are common.
        log_probs = -np.round(rng.exponential(1.0, children.shape) * 4) / 4
        candidates.extend(expanded, children.tolist(), log_probs.tolist())
        for row, parent in enumerate(expanded):
            for column in range(width):
                parents.append(parent)
                tokens.append(int(children[row, column]))
                scores.append(scores[parent] + float(log_probs[row, column]))

    grow([0])
    newest = 1
    begins = [1]
    for _ in range(1, depth):
        level = list(range(newest, len(parents)))
        expected = sorted(sorted(level, key=lambda c: (-scores[c], c))[:width])
        chosen = candidates.frontier(width)
        assert chosen == expected
        assert candidates.tokens_of(chosen) == [tokens[c] for c in expected]
        newest = len(parents)
        begins.append(newest)
        grow(expected)

    tree = candidates.best(nodes - 1)
    order = sorted(range(1, len(parents)), key=lambda c: (-scores[c], c))
    kept = sorted([0, *order[: nodes - 1]])
    assert tree.tokens.tolist() == [tokens[c] for c in kept]
    assert tree.parents.tolist() == [-1] + [kept.index(parents[c]) for c in kept[1:]]
    assert candidates.ranked == order
    assert candidates.scores == [scores[c] for c in order]
    assert candidates.levels == [scores[a:b] for a, b in itertools.pairwise([*begins, len(scores)])]
    assert (len(candidates), candidates.depth, candidates.newest) == (len(parents) - 1, depth, begins[-1])
    for candidate in range(len(parents)):
        path, step = list[int](), candidate
        while step:
            path.insert(0, tokens[step])
            step = parents[step]
        assert candidates.path_of(candidate) == path
