"""Proves that the demo's table and verdict say what was measured, also where that is no praise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from side_by_side import Comparison, Cost, compare, reasons, table, verdict

from dovetail.runtime import Pipeline, load
from dovetail.runtime.decoding.generation import Generation
from dovetail.runtime.decoding.stream import Stream

PLAIN = Cost(tokens=200, passes=200, decode_ms=2000, verify_ms=1950, draft_ms=0)
FAST = Comparison(0.0, PLAIN, Cost(tokens=200, passes=100, decode_ms=1250, verify_ms=1000, draft_ms=200), True)
SLOW = Comparison(0.7, PLAIN, Cost(tokens=200, passes=160, decode_ms=2500, verify_ms=1920, draft_ms=480), True)


@pytest.fixture(scope="module")
def pipe(shipped_artifact: Path) -> Iterator[Pipeline]:
    with load(shipped_artifact, ctx_size=256, profile=None) as opened:
        yield opened


def test_the_table() -> None:
    assert [line.split() for line in table([FAST, SLOW])] == [
        ["T", "=", "0", "T", "=", "0.7"],
        ["plain", "Dovetail", "plain", "Dovetail"],
        ["tokens/s", "100.0", "160.0", "100.0", "80.0"],
        ["passes", "over", "the", "weights", "200", "100", "200", "160"],
        ["tokens", "a", "pass", "1.00", "2.00", "1.00", "1.25"],
    ]
    assert len({len(line) for line in table([FAST, SLOW])}) == 1, "columns stand below one another"


def test_the_verdict() -> None:
    assert verdict([FAST, SLOW]) == (
        "Against plain decoding Dovetail is 1.60 times as fast at T = 0, 0.80 times as fast at T = 0.7; the texts are "
        "the same, token by token."
    )
    assert "THE TEXTS ARE NOT THE SAME" in verdict([FAST, dataclasses.replace(SLOW, same=False)])


def test_what_is_slower_is_explained() -> None:
    assert reasons([FAST]) == []
    assert reasons([FAST, SLOW]) == [
        "Slower at T = 0.7: on this machine a round costs 1.56 plain ones (the target's pass 1.20, the draft 0.30, the "
        "rest 0.06) and brings 1.25 tokens."
    ]


def test_both_ways_make_the_same_texts(pipe: Pipeline) -> None:
    prompts = ["import os\n", "class Tree:\n"]
    greedy, sampled = compare(pipe, prompts, (0.0, 0.7), max_new_tokens=24, seconds=0)
    for one in (greedy, sampled):
        assert one.same
        assert one.plain.passes == one.plain.tokens == one.ours.tokens > 24
        assert one.ours.passes < one.ours.tokens, "the draft that ships is right now and then"
        assert one.plain.draft_ms == 0 < one.ours.draft_ms
        assert one.ours.verify_ms + one.ours.draft_ms < one.ours.decode_ms


def test_texts_that_part_are_noticed(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, made = Stream.finish, 0

    def with_one_wrong(stream: Stream) -> Generation:
        nonlocal made
        made += 1
        done = finish(stream)
        return done if made != 2 else dataclasses.replace(done, token_ids=[*done.token_ids[:-1], 0])

    monkeypatch.setattr(Stream, "finish", with_one_wrong)
    (one,) = compare(pipe, ["import os\n"], (0.0,), max_new_tokens=8, seconds=0)
    assert not one.same
