"""Proves which rows are added to a pass that nobody reads: as many as it lacks, so that it has the same kernels whoever
takes part in it; never one row alone, nor fewer subsequences than threads without a block.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.targets.openvino.layout import Rows, filling

PAGES = [7, 8, 9]
THREADS = st.integers(1, 200)


def rows(count: int, *, are_alone: bool) -> Rows:
    return Rows(np.ones(count, np.int64), np.arange(count), 5, [0], are_alone=are_alone)


def alone(most: int = 40) -> st.SearchStrategy[Rows]:
    return st.integers(1, most).map(lambda count: rows(count, are_alone=True))


def block() -> st.SearchStrategy[Rows]:
    return st.integers(2, 40).map(lambda count: rows(count, are_alone=False))


def whole(parts: list[Rows], wanted: int, threads: int) -> list[Rows]:
    """The pass."""
    fill = filling(parts, wanted, threads, PAGES)
    return parts if fill is None else [*parts, fill]


@given(st.lists(st.one_of(alone(), block()), min_size=1, max_size=5), st.integers(0, 100), THREADS)
def test_a_pass_has_a_block_or_a_subsequence_for_each_thread(parts: list[Rows], wanted: int, threads: int) -> None:
    made = whole(parts, wanted, threads)
    count = sum(map(len, made))
    assert count >= max(wanted, sum(map(len, parts)), 2)
    has_block = any(not part.are_alone and len(part) > 1 for part in made)
    assert has_block or sum(part.subsequences for part in made) >= threads


@given(st.lists(st.one_of(alone(), block()), min_size=1, max_size=5), st.integers(0, 100), THREADS)
def test_no_more_is_added_than_a_block(parts: list[Rows], wanted: int, threads: int) -> None:
    fill = filling(parts, wanted, threads, PAGES)
    fed = sum(map(len, parts))
    assert 0 <= (len(fill) if fill else 0) - max(wanted - fed, 0) <= 2
    is_enough = fed >= max(wanted, threads, 2) or (fed >= wanted and any(not part.are_alone for part in parts))
    assert (fill is None) == is_enough, "and only where something is lacking"


@given(st.integers(1, 100), THREADS)
def test_of_rows_alone_a_pass_has_the_same_number_however_many_are_fed(wanted: int, threads: int) -> None:
    """In one part or in several."""
    sizes = set()
    for fed in range(1, wanted + 1):
        for parts in ([rows(fed, are_alone=True)], [rows(1, are_alone=True)] * fed):
            sizes.add(sum(map(len, whole(parts, wanted, threads))))
    assert len(sizes) == 1


@given(st.lists(block(), min_size=1, max_size=3), st.integers(0, 100), THREADS)
def test_beside_a_block_only_the_size_is_filled_up(parts: list[Rows], wanted: int, threads: int) -> None:
    assert sum(map(len, whole(parts, wanted, threads))) == max(wanted, sum(map(len, parts)))


@given(alone(), st.integers(0, 100), THREADS)
def test_what_is_added_is_a_text_of_its_own(part: Rows, wanted: int, threads: int) -> None:
    fill = filling([part], wanted, threads, PAGES)
    if fill is not None:
        assert (fill.past, fill.pages, fill.mask, fill.subsequences) == (0, PAGES, None, 1)
        assert fill.depths.tolist() == list(range(len(fill)))
        assert fill.tokens.tolist() == [0] * len(fill)


def test_passes_of_few_rows() -> None:
    """With 4 threads: a row more makes three subsequences four; fewer get a block of two."""
    counts = {fed: filling([rows(fed, are_alone=True)], 0, 4, PAGES) for fed in range(1, 6)}
    assert {fed: len(fill) if fill else 0 for fed, fill in counts.items()} == {1: 2, 2: 2, 3: 1, 4: 0, 5: 0}
