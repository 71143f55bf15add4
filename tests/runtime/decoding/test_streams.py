"""Proves what a reader may do with streams: any number of them in one thread, in threads, in an event loop; dropped,
closed and cancelled, from here and from elsewhere; and that no chunk, error or page is lost.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes.costs import FREE
from fakes.guesses import FakeGraph, best
from fakes.pipeline import FakePipeline, LetterTokenizer
from fakes.target import FakeTarget

from dovetail.runtime.decoding.generation import Chunk
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.errors import NothingAllowedError, PassAbandonedError
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.trees.shape import TreeShape

CONFIG = GenerationConfig(max_new_tokens=60, temperature=1.0, seed=5)
PROMPT = [1, 2, 3, 4, 5, 6, 7]
FIXED = Policy("fixed", TreeShape(8, 3, 3), is_wish=True)


class Streams:
    """A pipeline with a draft model, on fakes."""

    def __init__(self) -> None:
        self.target = FakeTarget()
        self.graph = FakeGraph(best(self.target))
        self.pipe = FakePipeline(self.target, graph=self.graph, costs=FREE)

    def stream(self, seed: int = 5, **controls: Any) -> Stream:
        config = CONFIG.with_changes(seed=seed, **controls)
        return self.pipe.stream(PROMPT, config, FIXED, model=ModelDraft(self.graph))

    def tokens(self, seed: int = 5) -> list[int]:
        """What a text has in a pipeline of its own."""
        return Streams().stream(seed).finish().token_ids

    @property
    def is_free(self) -> bool:
        """Whether no page and no draft row is taken."""
        rows = self.graph.pool
        return self.target.free == self.target.capacity and rows.num_free == rows.max_blocks


@pytest.fixture
def streams() -> Iterator[Streams]:
    made = Streams()
    yield made
    made.pipe.engine.sweep()
    assert made.pipe.engine.is_idle
    assert made.is_free, "something leaked"


def ids(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def test_two_streams_in_one_thread_take_turns(streams: Streams) -> None:
    first, second = streams.stream(1), streams.stream(2)
    got: tuple[list[Chunk], list[Chunk]] = [], []
    while chunks := [(i, chunk) for i, one in enumerate((first, second)) if (chunk := next(one, None)) is not None]:
        for i, chunk in chunks:
            got[i].append(chunk)
    assert (ids(got[0]), ids(got[1])) == (streams.tokens(1), streams.tokens(2))
    assert first.finish().texts > first.finish().rounds, "they shared passes"


def test_who_waits_for_one_moves_the_others_on(streams: Streams) -> None:
    first, second = streams.stream(1), streams.stream(2)
    next(second)
    whole = first.finish()
    assert len(second._inbox) > 10, "its chunks wait for their reader"
    assert (whole.token_ids, second.finish().token_ids) == (streams.tokens(1), streams.tokens(2))


def test_many_threads_share_the_passes(streams: Streams) -> None:
    expected = {seed: streams.tokens(seed) for seed in range(8)}
    got: dict[int, list[int]] = {}
    texts: list[int] = []
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        for _ in range(3):
            barrier.wait()
            chunks = list(stream := streams.stream(seed))
            got[seed] = ids(chunks)
            assert chunks[-1].finish_reason == "length"
            texts.append(stream.finish().texts - stream.finish().rounds)
            assert got[seed] == expected[seed]

    run_all([lambda seed=seed: work(seed) for seed in range(8)])
    assert got == expected
    assert sum(texts) > 0, "no pass was shared"


def run_all(work: list[Callable[[], None]]) -> None:
    """Each in a thread of its own; the first error of any."""
    errors: deque[BaseException] = deque()

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_an_event_loop_goes_on_meanwhile(streams: Streams) -> None:
    async def read(seed: int) -> list[Chunk]:
        return [chunk async for chunk in streams.stream(seed)]

    async def all_of_them() -> list[list[Chunk]]:
        return await asyncio.gather(*(read(seed) for seed in range(4)))

    got = asyncio.run(all_of_them())
    assert [ids(chunks) for chunks in got] == [streams.tokens(seed) for seed in range(4)]


def test_a_dropped_stream_frees_its_memory_and_disturbs_nobody(streams: Streams) -> None:
    gc.disable()  # dropping it is enough
    try:
        other, dropped = streams.stream(1), streams.stream(2)
        next(dropped)
        del dropped
        next(other)
        next(other)
        assert len(streams.pipe.engine._running) == 1
        assert other.finish().token_ids == streams.tokens(1)
        assert streams.is_free
    finally:
        gc.enable()


def test_a_cancel_is_seen_at_the_next_step_wherever_it_comes_from(streams: Streams) -> None:
    stream, other = streams.stream(1), streams.stream(2)
    first = next(stream)
    next(other)
    waiting = list(stream._inbox)
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()
    rest = list(stream)
    assert ids(rest) == ids(waiting)
    assert rest[-1].finish_reason == "cancelled"
    done = stream.finish()
    assert done.finish_reason == "cancelled"
    assert done.token_ids == ids([first, *rest]) == streams.tokens(1)[: len(done.token_ids)]
    assert other.finish().token_ids == streams.tokens(2)


def test_a_close_from_another_thread_ends_a_stream_that_is_being_read(streams: Streams) -> None:
    stream, is_read = streams.stream(1, max_new_tokens=2000), threading.Event()
    chunks: list[Chunk] = []

    def read() -> None:
        for chunk in stream:
            chunks.append(chunk)
            is_read.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert is_read.wait(30)
    stream.close()
    reader.join(30)
    assert not reader.is_alive()
    assert stream.finish().finish_reason == "cancelled"
    assert len(stream.finish().token_ids) < 2000
    streams.pipe.engine.sweep()
    assert streams.is_free


def test_a_close_in_the_middle_of_a_step_is_seen_behind_it(streams: Streams) -> None:
    """Of another stream, by the thread that makes the step; a signal handler may do so, too."""
    stream, other = streams.stream(1), streams.stream(2)
    next(stream)
    next(other)
    streams.target.watch = lambda steps: other.close()
    rest = list(stream)
    assert ids(rest)[-10:] == streams.tokens(1)[-10:]
    assert other.finish().finish_reason == "cancelled"


@pytest.mark.parametrize("passes", [0, 1, 5])
def test_a_cancel_while_a_long_prompt_is_read_waits_for_one_pass(streams: Streams, passes: int) -> None:
    stream = streams.pipe.stream(PROMPT * 300, CONFIG)  # 2,100 tokens, nine passes
    seen = 0

    def watch(steps: Any) -> None:  # before and behind every pass
        nonlocal seen
        seen += 1
        if seen == 2 * passes + 1:
            threading.Thread(target=stream.cancel).start()

    streams.target.watch = watch
    done = stream.finish()
    assert (done.finish_reason, done.token_ids) == ("cancelled", [])
    assert seen == 2 * (passes + 1)


class Abandoning:
    """A target whose passes can be ended: it does so behind the moment at which it is asked."""

    def __init__(self, target: FakeTarget, what: Callable[[], None], at: int) -> None:
        self.asked, self.moments = 0, 0
        self.what, self._at, self._is_due = what, at, False
        target.abandon = self.abandon  # type: ignore[method-assign]
        target.watch = self.watch

    def abandon(self) -> None:
        self.asked += 1
        self._is_due = True

    def watch(self, steps: Any) -> None:  # before and behind every pass
        self.moments += 1
        if self.moments == self._at:
            self.what()
        if self._is_due:
            self._is_due = False
            raise PassAbandonedError


@pytest.mark.parametrize("at", [1, 2, 9, 10])
def test_a_pass_that_nobody_waits_for_is_ended(streams: Streams, at: int) -> None:
    expected = streams.tokens(1)
    stream = streams.stream(1)
    target = Abandoning(streams.target, stream.cancel, at)
    done = stream.finish()
    assert done.finish_reason == "cancelled"
    assert done.token_ids == expected[: len(done.token_ids)]
    assert (target.asked, target.moments) == (1, at)


def test_a_pass_that_others_wait_for_goes_on(streams: Streams) -> None:
    stream, other = streams.stream(1), streams.stream(2)
    for one in (stream, other):
        one.open()
    target = Abandoning(streams.target, stream.cancel, 5)
    assert stream.finish().finish_reason == "cancelled"
    assert other.finish().token_ids == streams.tokens(2)
    assert target.asked == 0


@pytest.mark.parametrize("at", [1, 4, 7, 12])
def test_a_pass_that_is_ended_too_late_costs_the_next_text_nothing_but_time(streams: Streams, at: int) -> None:
    """Between the question whether anybody waits and the end of the pass another one may have begun."""
    stream, other = streams.stream(1), streams.stream(2)
    for one in (stream, other):
        one.open()
    target = Abandoning(streams.target, lambda: None, at)
    target.what = target.abandon
    assert (stream.finish().token_ids, other.finish().token_ids) == (streams.tokens(1), streams.tokens(2))
    assert target.asked == 1


def test_a_conversation_that_is_closed_ends_its_text(streams: Streams) -> None:
    expected = streams.tokens(1)
    conversation = streams.pipe.conversation(ModelDraft(streams.graph))
    stream = streams.pipe.stream(PROMPT, CONFIG.with_changes(seed=1), FIXED, conversation=conversation)
    next(stream)
    conversation.close()
    assert streams.is_free
    assert stream.finish().finish_reason == "cancelled"
    assert stream.finish().token_ids == expected[: len(stream.finish().token_ids)]
    again = streams.pipe.stream(PROMPT, CONFIG.with_changes(seed=1), FIXED, conversation=conversation)
    assert again.finish().token_ids == expected
    conversation.close()


def test_a_conversation_that_is_closed_in_the_middle_of_a_step_is_freed_behind_it(streams: Streams) -> None:
    conversation = streams.pipe.conversation(ModelDraft(streams.graph))
    stream = streams.pipe.stream(PROMPT, CONFIG, FIXED, conversation=conversation)
    next(stream)
    streams.target.watch = lambda steps: conversation.close()
    assert stream.finish().finish_reason == "cancelled"
    assert streams.is_free


def test_a_stream_that_never_began_ends_at_once(streams: Streams) -> None:
    stream = streams.stream(1)
    stream.close()
    assert list(stream) == []
    assert stream.finish().finish_reason == "cancelled"
    waiting = streams.stream(2)
    waiting.open()
    waiting.cancel()
    assert [chunk.finish_reason for chunk in waiting] == ["cancelled"]


def test_an_error_comes_behind_the_chunks_before_it_and_once(streams: Streams) -> None:
    """No token may occur twice, so the text runs out of tokens."""
    stream, other = streams.stream(1, no_repeat_ngram_size=1), streams.stream(2)
    chunks: list[Chunk] = []
    with pytest.raises(NothingAllowedError):
        chunks.extend(stream)  # it keeps what came before the error
    assert len(ids(chunks)) == 12 - len(set(PROMPT))
    assert list(stream) == []
    assert stream.finish().finish_reason == "error"
    assert other.finish().token_ids == streams.tokens(2)


class LateInbox(deque[Chunk]):
    """The last chunk comes, and the text is over, while its reader looks whether there is one."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream: Stream | None = stream

    def __bool__(self) -> bool:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.finish_last()  # type: ignore[attr-defined]
            return False
        return len(self) > 0

    def __len__(self) -> int:
        return super().__len__()


def test_the_last_chunk_is_read_though_another_thread_brings_it_at_that_moment(streams: Streams) -> None:
    stream = streams.stream(1, max_new_tokens=1)
    stream.open()

    def finish_last() -> None:
        while not streams.pipe.engine.is_idle:
            streams.pipe.engine.step()

    stream.finish_last = finish_last  # type: ignore[attr-defined]
    stream._inbox = LateInbox(stream)
    assert ids(list(stream)) == streams.tokens(1)[:1]


class FailingTokenizer(LetterTokenizer):
    """Raises `error` at the token with the number `at`."""

    def __init__(self, at: int, error: BaseException) -> None:
        self._at, self._error, self._count = at, error, 0

    def push(self, token_ids: Any) -> str:
        self._count += 1
        if self._count == self._at:
            raise self._error
        return super().push(token_ids)


def test_a_text_whose_last_token_cannot_be_shown_ends_with_an_error(streams: Streams) -> None:
    expected = streams.tokens(2)
    stream, other = streams.stream(1, max_new_tokens=6), streams.stream(2)
    stream._detokenizer = FailingTokenizer(6, RuntimeError("no such token"))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="no such token"):
        list(stream)
    assert stream.finish().finish_reason == "error"
    assert other.finish().token_ids == expected


@pytest.mark.parametrize("at", [1, 2, 5, 30])
def test_an_interrupt_while_chunks_are_told_costs_one_text_its_end_and_the_others_nothing(
    streams: Streams, at: int
) -> None:
    texts = [streams.stream(seed) for seed in range(3)]
    texts[1]._detokenizer = FailingTokenizer(at, KeyboardInterrupt())  # type: ignore[assignment]
    for stream in texts:
        stream.open()
    interrupts = 0
    while not streams.pipe.engine.is_idle:
        try:
            streams.pipe.engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    assert [stream.finish().finish_reason for stream in texts] == ["length", "cancelled", "length"]
    for seed in (0, 2):
        assert texts[seed].finish().token_ids == streams.tokens(seed)


def test_ctrl_c_closes_the_stream_that_is_read_and_the_others_go_on(streams: Streams) -> None:
    stream, other = streams.stream(1), streams.stream(2)
    next(stream)
    passes = iter(range(100))

    def interrupt(steps: Any) -> None:
        if next(passes) == 3:
            raise KeyboardInterrupt

    streams.target.watch = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    done = stream.finish()
    assert done.finish_reason == "cancelled"
    assert done.token_ids == streams.tokens(1)[: len(done.token_ids)]
    assert other.finish().token_ids == streams.tokens(2)
