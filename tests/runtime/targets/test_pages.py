"""Proves the page bookkeeping by a hypothesis state machine: no block is held twice, none is lost, slots never move."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dovetail.runtime.errors import ContextOverflowError
from dovetail.runtime.targets.openvino.pages import BlockPool, BlockTable


class Pages(RuleBasedStateMachine):
    @initialize(blocks=st.integers(1, 12), size=st.sampled_from([1, 4, 32]))
    def start(self, blocks: int, size: int) -> None:
        self.pool = BlockPool(blocks, size)
        self.tables = [BlockTable(self.pool) for _ in range(3)]
        self.slots: list[list[tuple[int, int]]] = [[], [], []]

    @rule(which=st.integers(0, 2), count=st.integers(0, 50))
    def grow(self, which: int, count: int) -> None:
        table, free = self.tables[which], self.pool.num_free
        try:
            table.reserve(count)
        except ContextOverflowError:
            assert self.pool.num_free == free
            return
        new = [table.slot(table.length + i) for i in range(count)]
        table.length += count
        self.slots[which] += new

    @rule(which=st.integers(0, 2), count=st.integers(0, 50))
    def reserve_without_counting(self, which: int, count: int) -> None:
        """A tree that is verified and then rejected whole."""
        try:
            self.tables[which].reserve(count)
        except ContextOverflowError:
            return
        self.tables[which].truncate(self.tables[which].length)

    @rule(which=st.integers(0, 2), share=st.floats(0, 1))
    def roll_back(self, which: int, share: float) -> None:
        length = int(self.tables[which].length * share)
        self.tables[which].truncate(length)
        del self.slots[which][length:]

    @rule(which=st.integers(0, 2))
    def release(self, which: int) -> None:
        self.tables[which].release()
        self.slots[which].clear()

    @invariant()
    def every_block_is_somewhere_once(self) -> None:
        held = [block for table in self.tables for block in table.blocks]
        assert len(set(held)) == len(held)
        assert len(held) + self.pool.num_free == self.pool.num_blocks

    @invariant()
    def slots_stay_where_they_are(self) -> None:
        for table, slots in zip(self.tables, self.slots, strict=True):
            assert [table.slot(i) for i in range(table.length)] == slots


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_full_pool_says_what_is_missing() -> None:
    table = BlockTable(BlockPool(2, 32))
    with pytest.raises(ContextOverflowError, match="room in the cache for 96 more tokens, got 64"):
        table.reserve(65)
