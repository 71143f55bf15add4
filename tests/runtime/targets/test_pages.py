"""Proves the page bookkeeping by a hypothesis state machine that plays the memory, too: no page is lost or handed out
while somebody holds it, and what a table counts stays what it wrote, whoever shares its pages and writes behind them.
"""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dovetail.runtime.errors import CacheFullError
from dovetail.runtime.targets.openvino.pages import PageCopy, PagePool, PageTable


@dataclasses.dataclass
class Written:
    """A table, and what it has written into its slots: a number that was never written before."""

    table: PageTable
    values: list[int]


class Pages(RuleBasedStateMachine):
    which = st.integers(0, 3)
    count = st.integers(0, 50)

    @initialize(num_pages=st.integers(1, 16), size=st.sampled_from([1, 4, 32]))
    def start(self, num_pages: int, size: int) -> None:
        self.pool = PagePool(num_pages, size)
        self.memory: dict[tuple[int, int], int] = {}  # (page, offset) -> value
        self.newest = 0
        self.tables = [Written(PageTable(self.pool), [])]

    def one(self, which: int) -> Written:
        return self.tables[which % len(self.tables)]

    def write(self, one: Written, count: int) -> list[int] | None:
        """What a pass does: `count` new values behind the counted ones. None where there is no room."""
        table = one.table
        before = (self.pool.num_free, table.length, table.pages.copy())
        try:
            copy = table.reserve(count)
        except CacheFullError:
            assert (self.pool.num_free, table.length, table.pages) == before
            return None
        if copy is not None:
            for offset in range(copy.slots):
                self.memory[copy.target, offset] = self.memory[copy.source, offset]
        new = range(self.newest, self.newest + count)
        self.newest += count
        for i, value in enumerate(new):
            self.memory[table.slot(table.length + i)] = value
        return list(new)

    @rule(which=which, count=count, share=st.floats(0, 1), forks=st.booleans())
    def grow(self, which: int, count: int, share: float, forks: bool) -> None:
        """Write, and count a part of it. In between the table may be forked."""
        one = self.one(which)
        new = self.write(one, count)
        if new is None:
            return
        if forks:
            self.fork(which)
        kept = round(share * count)
        one.table.length += kept
        one.values += new[:kept]

    @rule(which=which)
    def fork(self, which: int) -> None:
        one, free = self.one(which), self.pool.num_free
        if len(self.tables) < 4:
            self.tables.append(Written(one.table.fork(), one.values.copy()))
            assert self.pool.num_free == free, "a fork costs nothing until somebody writes"

    @rule(which=which, share=st.floats(0, 1))
    def truncate(self, which: int, share: float) -> None:
        one = self.one(which)
        length = int(one.table.length * share)
        one.table.truncate(length)
        del one.values[length:]

    @rule(which=which)
    def give_everything_back(self, which: int) -> None:
        one = self.one(which)
        one.table.truncate(0)
        one.values.clear()
        assert one.table.pages == []

    @invariant()
    def every_page_is_held_or_free(self) -> None:
        held = [page for one in self.tables for page in one.table.pages]
        assert len(set(held)) + self.pool.num_free == self.pool.num_pages
        for page in held:
            assert self.pool.is_shared(page) == (held.count(page) > 1)

    @invariant()
    def what_counts_is_what_was_written(self) -> None:
        for one in self.tables:
            assert one.table.length == len(one.values)
            assert [self.memory[one.table.slot(i)] for i in range(one.table.length)] == one.values

    def teardown(self) -> None:
        for one in getattr(self, "tables", []):
            one.table.truncate(0)
        assert not hasattr(self, "pool") or self.pool.num_free == self.pool.num_pages


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_a_full_pool_says_what_is_missing() -> None:
    table = PageTable(PagePool(2, 32))
    with pytest.raises(CacheFullError, match="expected 96 free tokens in the cache, got 64"):
        table.reserve(65)


def test_writing_into_a_shared_page_copies_what_counts_in_it() -> None:
    pool = PagePool(8, 4)
    first = PageTable(pool)
    assert first.reserve(6) is None
    first.length = 6
    second = first.fork()
    shared = second.pages.copy()
    copy = second.reserve(3)
    assert copy == PageCopy(shared[1], second.pages[1], 2)
    assert second.pages[0] == shared[0] == first.pages[0]
    assert second.pages[1] not in first.pages
    assert first.reserve(2) is None, "nobody else holds its page any more"


def test_at_a_pages_end_nothing_is_copied() -> None:
    pool = PagePool(8, 4)
    first = PageTable(pool)
    first.reserve(8)
    first.length = 8
    second = first.fork()
    assert second.reserve(1) is None
    assert first.reserve(1) is None
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
