"""Proves the law of the shared pass: a text's tokens are those that it has alone, one at a time, whatever its draft,
whoever its neighbours, whenever it was let in, preempted or interrupted, and however its prompt was cut; and at the end
of every trace no page and no draft row is taken. Bugs that are planted are noticed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from campaign import played
from fakes.target import FakeSequence
from hypothesis import given, settings
from oracles.numpy_target import NumpyTarget
from traces.player import holds
from traces.settings import TRACE_SETTINGS
from traces.trace import TRACES, VOCAB, Trace

from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.decoding.text_cache import TextCache
from dovetail.runtime.drafts.model_draft import ModelGrowth
from dovetail.runtime.errors import DrawError
from dovetail.runtime.targets.base import Step
from dovetail.runtime.trees.tree import chain

pytestmark = pytest.mark.usefixtures("quiet_drafts")

NUM_TRACES = 300
COUNTS: Counter[str] = Counter()


@settings(TRACE_SETTINGS, max_examples=NUM_TRACES)
@given(TRACES)
def test_a_text_is_what_it_is_alone(trace: Trace) -> None:
    player = holds(trace)
    COUNTS.update(player.counts())
    COUNTS["traces"] += 1


def test_the_traces_had_all_of_it_in_them() -> None:
    """A law about what never happens would prove nothing."""
    if not COUNTS:
        pytest.skip("it counts what the law before it has played")
    print(dict(COUNTS))
    assert COUNTS["traces"] == NUM_TRACES
    for what in ("interrupts", "preemptions", "forced", "failures", "siblings", "reused", "cancelled", "error", "stop"):
        assert COUNTS[what] >= 10, what
    assert COUNTS["accepted"] > COUNTS["rounds"] / 5


@settings(TRACE_SETTINGS, max_examples=played(15, of=30))
@given(TRACES)
def test_so_it_is_on_a_target_that_computes(trace: Trace) -> None:
    """A Llama in numpy, whose rows depend on the whole text, and whose forks may find the cache full."""
    drafts = {"graph": "graph", "none": "none"}
    texts = [dataclasses.replace(text, draft=drafts.get(text.draft, "graph")) for text in trace.texts]
    target, reference = (NumpyTarget.random(vocab_size=VOCAB, capacity=size) for size in (trace.capacity, 4096))
    holds(dataclasses.replace(trace, texts=texts, graph_kind="lm"), target, reference)


# Bugs that are planted.


def rewind_but_for_the_sampler(self: TextSequence) -> None:
    length, context = self._mark
    self.finish_reason = None
    del self.text[length:]
    self.cache.truncate(context)


def rewind_but_for_the_end(self: TextSequence) -> None:
    reason = self.finish_reason
    REWIND(self)
    self.finish_reason = reason


def chunk_of_one_token_twice(self: TextSequence, count: int) -> Step:
    step = PLAN_CHUNK(self, count)
    begin = max(self.context - 1, 0)
    self._tree = chain(np.array(self.text[begin : begin + count], np.int64))
    return Step(step.sequence, self._tree, step.wanted)


def commit_another_end_of_a_chunk(self: FakeSequence, path: Sequence[int]) -> None:
    is_chunk = isinstance(path, range)
    COMMIT(self, path)
    if is_chunk:
        self.tokens[-1] = (self.tokens[-1] + 1) % VOCAB


def fork_that_stays_whole(self: FakeSequence) -> FakeSequence:
    fork = FORK(self)
    truncate = fork.truncate
    fork.truncate = lambda length: setattr(fork, "truncate", truncate)  # type: ignore[method-assign]
    return fork


def preempt_and_lose_a_token(self: TextSequence) -> None:
    PREEMPT(self)
    if self.new_tokens:
        self.text.pop()


def close_the_target_alone(self: TextCache) -> None:
    self.target.close()


def abandon_nothing(self: ModelGrowth) -> None:
    self._done = True


def often_interrupted(trace: Trace) -> Trace:
    """Where most of these bugs show."""
    return dataclasses.replace(trace, interrupts=frozenset(range(min(trace.interrupts, default=0), 600, 29)))


REWIND, PLAN_CHUNK, PREEMPT = TextSequence.rewind, TextSequence.plan_chunk, TextSequence.preempt
COMMIT, FORK = FakeSequence.commit, FakeSequence.fork


@pytest.mark.parametrize(
    ("place", "name", "mutant"),
    [
        (TextSequence, "rewind", rewind_but_for_the_sampler),
        (TextSequence, "rewind", rewind_but_for_the_end),
        (TextSequence, "plan_chunk", chunk_of_one_token_twice),
        (TextSequence, "preempt", preempt_and_lose_a_token),
        (FakeSequence, "commit", commit_another_end_of_a_chunk),
        (FakeSequence, "fork", fork_that_stays_whole),
        (TextCache, "close", close_the_target_alone),
        (ModelGrowth, "abandon", abandon_nothing),
    ],
)
def test_the_law_notices(place: type, name: str, mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, name, mutant)

    @settings(TRACE_SETTINGS, max_examples=400)
    @given(TRACES.map(often_interrupted))
    def law(trace: Trace) -> None:
        holds(trace)

    with pytest.raises((AssertionError, DrawError, ValueError)):  # the last: a chunk of less than no tokens
        law()
