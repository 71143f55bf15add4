"""Proves that trees are trees: masks, depths, children and paths against slow obvious versions, that reranking keeps
the best connected set, and that candidates know their levels, ranks, paths and rows.
"""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from traces.random_trees import path_to_root, trees

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


def children_of(tree: Tree, node: int) -> list[int]:
    return [child for child in range(len(tree)) if tree.parents[child] == node]


@given(trees())
def test_paths_lead_to_every_leaf_once(tree: Tree) -> None:
    paths = tree.paths()
    leaves = [node for node in range(len(tree)) if not children_of(tree, node)]
    assert sorted(path[-1] for path in paths) == leaves
    for path in paths:
        assert path == path_to_root(tree, path[-1])[::-1]
    assert {node for path in paths for node in path} == set(range(len(tree)))


@given(trees())
def test_the_first_path_always_takes_the_first_child(tree: Tree) -> None:
    path = tree.paths()[0]
    assert path[0] == 0
    for node, after in itertools.pairwise(path):
        assert after == children_of(tree, node)[0]
    assert not children_of(tree, path[-1])
    chain = tree.first_chain()
    assert chain.is_chain()
    assert chain.tokens.tolist() == tree.tokens[path].tolist()
    assert tree.is_chain() == (len(tree.paths()) == 1) == (len(path) == len(tree))


def test_a_tree_s_paths() -> None:
    """That of the docstring, and a chain whose nodes are not in the order of their depth."""
    assert Tree(np.zeros(5, np.int64), np.array([-1, 0, 0, 1, 1])).paths() == [[0, 1, 3], [0, 1, 4], [0, 2]]
    assert Tree(np.zeros(4, np.int64), np.array([-1, 0, 0, 2])).paths() == [[0, 1], [0, 2, 3]]
    assert Tree(np.zeros(1, np.int64), np.array([-1])).paths() == [[0]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.data())
def test_rows_of_candidates_are_those_of_their_tree_s_paths(
    seed: int, width: int, depth: int, data: st.DataObject
) -> None:
    """The best ones, in their order, and any connected ones in any order in which parents come first: every candidate
    adds what the paths are longer with it.
    """
    rng = np.random.default_rng(seed)
    candidates = CandidateTree(99)
    for level in range(depth):
        expanded = candidates.frontier(width) if level else [0]
        log_probs = -np.round(rng.exponential(1.0, (len(expanded), width)) * 4) / 4
        candidates.extend(expanded, [list(range(width))] * len(expanded), log_probs.tolist())
    any_order = list[int]()
    for _ in range(data.draw(st.integers(0, len(candidates)))):
        open_ones = [
            one
            for one in range(1, len(candidates) + 1)
            if one not in any_order and candidates.parent_of(one) in (0, *any_order)
        ]
        any_order.append(data.draw(st.sampled_from(open_ones)))
    for order in (candidates.ranked, any_order):
        rows = candidates.rows_of(order)
        assert len(rows) == len(order)
        for count in range(len(order) + 1):
            paths = candidates.tree_of(order[:count]).paths()
            assert sum(rows[:count]) == sum(map(len, paths)) - 1, "the root's own row is none of them"


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


def test_no_candidate_is_better_than_its_parent() -> None:
    """However sure a draft is, and whatever rounding does to that: else the best of them were no tree."""
    candidates = CandidateTree(7)
    candidates.add_level([0, 0], [3, 4], [-0.5, -1.0])
    candidates.add_level([1, 2], [5, 6], [1e-7, 9.0])
    assert candidates.scores == [-0.5, -0.5, -1.0, -1.0]
    for count in range(5):
        assert len(candidates.best(count)) == count + 1
