"""Proves what happens where the cache is full: texts wait, or are preempted and go on with the tokens that they would
have had; pages that nobody needs go first; a long prompt stops nobody. That a request's answers share its prompt. And
that whatever is read again is read as it was the first time.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from fakes.costs import FREE
from fakes.guesses import FakeGraph, best
from fakes.pipeline import PLAIN, FakePipeline
from fakes.target import FakeSequence, FakeTarget

from dovetail.runtime.decoding.round_planner import PROMPT_TOKENS, PROMPT_TOKENS_BESIDE
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.errors import CacheFullError
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.targets.base import Step, StepOutput
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Tree

FIXED = Policy("fixed", TreeShape(8, 3, 3), is_wish=True)


class Cache:
    """A pipeline with a small cache, on fakes."""

    def __init__(self, capacity: int = 4096, kind: str = "dgf") -> None:
        self.target = FakeTarget(capacity=capacity, remembers=True)
        self.graph = FakeGraph(best(self.target), kind=kind)
        self.pipe = FakePipeline(self.target, graph=self.graph, costs=FREE)

    def stream(self, prompt: Sequence[int], count: int = 40, seed: int = 1, **settings: Any) -> Stream:
        config = GenerationConfig(max_new_tokens=count, temperature=1.0, seed=seed)
        if "conversation" not in settings:
            settings["model"] = ModelDraft(self.graph)
        return self.pipe.stream(prompt, config, settings.pop("policy", FIXED), **settings)

    @staticmethod
    def tokens(prompt: Sequence[int], count: int = 40, seed: int = 1, number: int = 0) -> list[int]:
        """What the text has with a whole cache of its own."""
        return Cache(8192).stream(prompt, count, seed, number=number).finish().token_ids

    def close(self) -> None:
        self.pipe.engine.sweep()
        assert self.pipe.engine.is_idle
        assert self.target.free == self.target.capacity, "a page leaked"
        assert self.graph.pool.num_free == self.graph.pool.max_blocks, "a row of the draft leaked"


@pytest.fixture
def small() -> Iterator[Cache]:
    cache = Cache(200)
    yield cache
    cache.close()


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(12), k=length)


def test_texts_that_do_not_fit_are_preempted_and_go_on_with_the_same_tokens(small: Cache) -> None:
    texts = [small.stream(prompt(i, 30), seed=i) for i in range(5)]
    for stream in texts:
        stream.open()
    for i, stream in enumerate(texts):
        done = stream.finish()
        assert done.token_ids == small.tokens(prompt(i, 30), seed=i)
        assert done.draft_failure is None
    assert sum(stream._sequence.preemptions for stream in texts) > 0
    assert texts[0]._sequence.preemptions == 0, "the first one goes first"


def test_a_text_that_finds_no_room_waits_and_those_before_it_are_not_pushed_out(small: Cache) -> None:
    first = small.stream(prompt(1, 100))
    next(first)
    second = small.stream(prompt(2, 60))
    second.open()
    next(first)
    assert small.pipe.engine._running == [first._sequence]
    assert first.finish().token_ids == small.tokens(prompt(1, 100))
    assert second.finish().token_ids == small.tokens(prompt(2, 60))
    assert first._sequence.preemptions == second._sequence.preemptions == 0


def test_of_idle_conversations_the_one_that_was_idle_longest_goes_first(small: Cache) -> None:
    old, new = small.pipe.conversation(ModelDraft(small.graph)), small.pipe.conversation(ModelDraft(small.graph))
    answers = {}
    for conversation in (old, new, old, new):
        answers[conversation] = small.stream(prompt(1, 20), 10, conversation=conversation).finish().token_ids
    running = small.stream(prompt(2, 80), 40)
    assert running.finish().token_ids == small.tokens(prompt(2, 80), 40)
    assert running._sequence.preemptions == 0
    assert (old.cache.target.length, new.cache.target.length) == (0, 29)
    for conversation, reused in ((new, 29), (old, 0)):
        text = prompt(1, 20) + answers[conversation] + [5, 5, 5]
        again = small.stream(text, 10, conversation=conversation).finish()
        assert again.token_ids == small.tokens(text, 10)
        assert (again.reused_tokens > 0) == (reused > 0)
    for conversation in (old, new):
        conversation.close()


def test_a_conversation_that_waits_for_its_turn_gives_its_pages_too(small: Cache) -> None:
    """Else the only text that runs would find the cache full, with nobody to preempt."""
    with small.pipe.conversation(ModelDraft(small.graph)) as conversation:
        text = prompt(1, 90)
        text += small.stream(text, 10, conversation=conversation).finish().token_ids
        other = small.stream(prompt(2, 60), 60)
        next(other)
        again = small.stream([*text, 5], 10, conversation=conversation)
        again.open()
        assert other.finish().token_ids == small.tokens(prompt(2, 60), 60)
        assert again.finish().token_ids == small.tokens([*text, 5], 10)


def test_a_long_prompt_stops_nobody() -> None:
    cache = Cache(8192)
    decoding = [cache.stream(prompt(i, 10), 400, seed=i, policy=PLAIN) for i in range(4)]
    for stream in decoding:
        next(stream)
    passes: list[tuple[int, int]] = []  # prompt tokens, texts that decode

    def watch(steps: Sequence[Step]) -> None:
        read = [step for step in steps if step.wanted is not None]
        passes.append((sum(len(step.tree) for step in read), len(steps) - len(read)))

    cache.target.watch = watch
    long = cache.stream(prompt(9, 4000), 5)
    before = [len(stream._sequence.new_tokens) for stream in decoding]
    next(long)
    after = [len(stream._sequence.new_tokens) for stream in decoding]
    assert max(tokens for tokens, _ in passes) <= PROMPT_TOKENS_BESIDE
    assert {count for _, count in passes} == {4}
    count = len(passes) // 2  # passes: each was watched before and behind
    assert count == -(-4000 // PROMPT_TOKENS_BESIDE)
    assert [now - then for now, then in zip(after, before, strict=True)] == [count] * 4, "one token in every pass"
    for stream in decoding:
        stream.close()
    assert long.finish().token_ids == cache.tokens(prompt(9, 4000), 5)
    cache.close()


def test_a_prompt_alone_is_read_in_large_chunks() -> None:
    cache, sizes = Cache(), []
    cache.target.watch = lambda steps: sizes.append(len(steps[0].tree))
    next(cache.stream(prompt(1, 1000)))
    assert max(sizes) == PROMPT_TOKENS
    assert len(sizes) == 2 * -(-1000 // PROMPT_TOKENS)
    cache.close()


# A request's answers.


def answers(cache: Cache, length: int, count: int = 3) -> list[Stream]:
    streams = [cache.stream(prompt(3, length), number=number) for number in range(count)]
    streams[0].share_prompt(streams[1:])
    return streams


@pytest.mark.parametrize("kind", ["dgf", "lm"])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_answers_share_the_reading_of_their_prompt(length: int, kind: str) -> None:
    cache, read = Cache(kind=kind), []
    cache.target.watch = lambda steps: read.extend(len(step.tree) for step in steps if step.wanted is not None)
    streams = answers(cache, length)
    done = [stream.finish() for stream in streams]
    for number, one in enumerate(done):
        assert one.token_ids == cache.tokens(prompt(3, length), number=number)
        assert one.draft_failure is None
        assert one.reused_tokens == (length - 1 if number else 0)
    tokens = length + len(done) - 1
    assert sum(read) == 2 * tokens, "once, and its last token by every answer; every pass is watched twice"
    cache.close()


def test_a_prompt_that_is_read_again_tells_the_answers_drafts_every_feature_once() -> None:
    """The reader is preempted in the middle of it; the fakes look at every feature."""
    cache = Cache()
    neighbour = cache.stream(prompt(4, 8), 100, policy=PLAIN)
    next(neighbour)
    first, *others = answers(cache, 600)
    engine = cache.pipe.engine
    for _ in range(3):
        engine.step()
    assert 0 < first._sequence.context < 600
    engine._preempt(first._sequence)
    for number, stream in enumerate([first, *others]):
        done = stream.finish()
        assert done.token_ids == cache.tokens(prompt(3, 600), number=number)
        assert done.draft_failure is None
    assert all(stream._sequence.reused == 599 for stream in others)
    neighbour.close()
    cache.close()


def test_an_answer_that_was_cancelled_meanwhile_gets_no_pages() -> None:
    cache = Cache()
    first, second, third = answers(cache, 600)
    cache.pipe.engine.step()
    second.close()
    assert first.finish().token_ids == cache.tokens(prompt(3, 600))
    assert third.finish().token_ids == cache.tokens(prompt(3, 600), number=2)
    cache.close()


def test_answers_whose_reader_was_cancelled_read_the_prompt_themselves() -> None:
    cache = Cache()
    first, second, third = answers(cache, 600)
    cache.pipe.engine.step()
    first.close()
    for number, stream in ((1, second), (2, third)):
        assert stream.finish().token_ids == cache.tokens(prompt(3, 600), number=number)
    cache.close()


def test_answers_for_which_there_is_no_room_read_the_prompt_later() -> None:
    cache = Cache(200)
    for number, stream in enumerate(answers(cache, 90)):
        assert stream.finish().token_ids == cache.tokens(prompt(3, 90), number=number)
    cache.close()


# Branches of trees.


def test_where_a_tree_s_branches_find_no_room_its_first_path_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text itself has room, so nobody has to go."""
    cache, fed = Cache(), list[Tree]()

    def reserve_tree(sequence: FakeSequence, tree: Tree) -> None:
        if not tree.is_chain():
            raise CacheFullError("planted")
        sequence.reserve(len(tree))

    monkeypatch.setattr(FakeSequence, "reserve_tree", reserve_tree)
    cache.target.watch = lambda steps: fed.extend(step.tree for step in steps if not step.is_prompt)
    done = cache.stream(prompt(1, 30)).finish()
    assert done.token_ids == Cache.tokens(prompt(1, 30))
    assert all(tree.is_chain() for tree in fed)
    assert max(map(len, fed)) == 4, "as deep as the tree"
    cache.close()


def test_a_pass_is_asked_for_with_room_for_every_path_and_keeps_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that decode, with trees whose siblings cost whole paths, beside one whose prompt is read."""
    cache, passes = Cache(), list[tuple[int, int, int]]()
    forward = FakeTarget.forward

    def watched(target: FakeTarget, steps: Sequence[Step], rows: int = 0) -> list[StepOutput]:
        read = sum(len(step.tree) for step in steps if step.wanted is not None)
        fed = sum(sum(map(len, step.tree.paths())) for step in steps if step.wanted is None)
        if target is cache.target:
            passes.append((read, fed, rows - read))
        return forward(target, steps, rows)

    monkeypatch.setattr(FakeTarget, "forward", watched)
    streams = [cache.stream(prompt(i, 10 + 150 * i), 60, seed=i) for i in range(3)]
    for stream in streams:
        stream.open()
    for i, stream in enumerate(streams):
        assert stream.finish().token_ids == Cache.tokens(prompt(i, 10 + 150 * i), 60, seed=i)
    assert all(fed <= size for _, fed, size in passes)
    assert any(read and fed for read, fed, _ in passes)
    assert max(fed for _, fed, _ in passes) > 24, "three trees of eight nodes have more rows than nodes"
    sizes = [size for read, fed, size in passes if fed and not read]
    assert len(sizes) >= 20
    assert sum(a != b for a, b in itertools.pairwise(sizes)) < len(sizes) / 3
    cache.close()


# What is given is read in blocks, what was drawn is verified row by row, whenever it is read.


class Rows:
    """How each token of one text was computed, by its position: in a block of a prompt or not."""

    def __init__(self, cache: Cache) -> None:
        self.is_prompt: dict[int, bool] = {}
        cache.target.watch = self.watch

    def watch(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.wanted is None:
                continue  # a tree
            begin, count = step.sequence.length, len(step.tree)
            for position in range(begin, begin + count):
                self.is_prompt[position] = step.is_prompt

    @property
    def drawn(self) -> set[int]:
        """Positions that were read as drawn."""
        return {position for position, is_prompt in self.is_prompt.items() if not is_prompt}


def test_a_preempted_text_reads_its_own_tokens_as_it_drew_them() -> None:
    cache = Cache()
    neighbour = cache.stream(prompt(4, 8), 100, policy=PLAIN)
    next(neighbour)
    stream = cache.stream(prompt(1, 30))
    for _ in range(4):
        next(stream)
    made = len(stream._sequence.new_tokens)
    assert made > 3
    cache.pipe.engine._preempt(stream._sequence)
    rows = Rows(cache)
    assert stream.finish().token_ids == Cache.tokens(prompt(1, 30))
    assert rows.is_prompt == {position: position < 30 for position in range(30 + made)}
    neighbour.close()
    cache.close()


@pytest.mark.parametrize("is_evicted", [False, True])
def test_an_evicted_conversation_reads_each_answer_as_it_was_drawn(is_evicted: bool) -> None:
    """But the last token that an old and a new text share counts as given in either case, and the drawn ones behind
    where they part are none any more.
    """
    cache = Cache()
    with cache.pipe.conversation(ModelDraft(cache.graph)) as conversation:
        text, answers = prompt(1, 20), list[range]()
        for turn in range(3):
            new = cache.stream(text, 10, conversation=conversation).finish().token_ids
            answers.append(range(len(text), len(text) + len(new)))
            text = text + new + prompt(turn, 5)
        if is_evicted:
            assert conversation.evict()
        parted = answers[2].start + 4
        text = [*text[:parted], (text[parted] + 1) % 12, 3, 3]
        rows = Rows(cache)
        cache.stream(text, 10, conversation=conversation).finish()
        answers[:2] = [range(answer.start, answer.stop - 1) for answer in answers[:2]]
        drawn = {position for answer in answers for position in answer if position < parted - 1}
        begin = min(rows.is_prompt)
        assert begin == (0 if is_evicted else parted - 1)
        assert set(rows.is_prompt) == set(range(begin, len(text)))
        assert rows.drawn == {position for position in drawn if position >= begin}
    cache.close()


def test_a_turn_that_is_cancelled_while_it_reads_again_forgets_nothing_of_what_was_drawn() -> None:
    cache = Cache()
    with cache.pipe.conversation(ModelDraft(cache.graph)) as conversation:
        text = prompt(1, 20)
        text = text + cache.stream(text, 10, conversation=conversation).finish().token_ids + prompt(2, 300)
        conversation.evict()
        cancelled = cache.stream(text, 10, conversation=conversation)
        cancelled.open()
        cache.pipe.engine.step()
        assert cancelled._sequence.context == 20, "as far as all was given"
        cancelled.close()
        rows = Rows(cache)
        cache.stream(text, 10, conversation=conversation).finish()
        assert rows.drawn == set(range(20, 29))
    cache.close()
