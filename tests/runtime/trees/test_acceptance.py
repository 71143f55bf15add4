"""Proves the acceptance walk on hand-written trees: never, always and sometimes accepting, repeated siblings, and the
caller's limit.
"""

from __future__ import annotations

import numpy as np
import pytest

from dovetail.runtime.errors import TargetError
from dovetail.runtime.trees.acceptance import accept
from dovetail.runtime.trees.tree import Float32s, Tree

V = 8
# 0 ─┬─ 1 (token 3) ─┬─ 3 (token 5) ── 5 (token 7)
#    └─ 2 (token 4)  └─ 4 (token 6)
TREE = Tree(np.array([2, 3, 4, 5, 6, 7]), np.array([-1, 0, 0, 1, 1, 3]))


def greedy(row: Float32s) -> int:
    return int(row.argmax())


def logits(*wanted: int) -> Float32s:
    """[N, V] whose row i prefers token wanted[i]."""
    rows = np.zeros((len(wanted), V), np.float32)
    rows[np.arange(len(wanted)), list(wanted)] = 5
    return rows


@pytest.mark.parametrize(
    ("wanted", "path", "tokens"),
    [
        pytest.param((1, 0, 0, 0, 0, 0), [0], [1], id="never"),
        pytest.param((3, 5, 0, 7, 0, 1), [0, 1, 3, 5], [3, 5, 7, 1], id="always"),
        pytest.param((4, 5, 0, 7, 0, 1), [0, 2], [4, 0], id="sometimes: the second sibling"),
        pytest.param((3, 6, 0, 7, 2, 1), [0, 1, 4], [3, 6, 2], id="sometimes: a branch, then a miss"),
        pytest.param((5, 5, 5, 5, 5, 5), [0], [5], id="a grandchild's token is no child"),
    ],
)
def test_walk(wanted: tuple[int, ...], path: list[int], tokens: list[int]) -> None:
    accepted = accept(TREE, logits(*wanted), greedy)
    assert accepted.path == path
    assert accepted.tokens == tokens
    assert accepted.accept_length == len(tokens) - 1


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_limit_ends_the_walk(limit: int) -> None:
    accepted = accept(TREE, logits(3, 5, 0, 7, 0, 1), greedy, limit)
    assert accepted.tokens == [3, 5, 7, 1][:limit]
    assert len(accepted.path) == len(accepted.tokens)


def test_siblings_with_one_token_are_one_choice() -> None:
    twins = Tree(np.array([2, 3, 3, 6]), np.array([-1, 0, 0, 2]))
    assert accept(twins, logits(3, 6, 6, 1), greedy).path == [0, 1]  # the first twin has no children


def test_every_emitted_token_is_one_draw_in_the_order_of_the_text() -> None:
    wanted = logits(3, 5, 0, 7, 0, 1)
    drawn_from: list[int] = []

    def recording(row: Float32s) -> int:
        drawn_from.append(next(i for i in range(len(TREE)) if np.shares_memory(wanted[i], row)))
        return int(row.argmax())

    accept(TREE, wanted, recording)
    assert drawn_from == [0, 1, 3, 5]


def test_nothing_is_drawn_behind_an_end() -> None:
    accepted = accept(TREE, logits(3, 5, 0, 7, 0, 1), greedy, ends=frozenset({5}))
    assert accepted.tokens == [3, 5]
    assert accepted.path == [0, 1]


def test_a_draw_that_fails_counts_at_the_root_only() -> None:
    def failing(row: Float32s) -> int:
        if row[7] == 5:
            raise TargetError("not numbers")
        return int(row.argmax())

    accepted = accept(TREE, logits(3, 5, 0, 7, 0, 1), failing)
    assert (accepted.path, accepted.tokens) == ([0, 1], [3, 5])
    with pytest.raises(TargetError):
        accept(TREE, logits(7, 5, 0, 7, 0, 1), failing)
