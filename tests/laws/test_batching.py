"""Proves the law of the shared pass: a text's tokens are those that it has alone, one at a time, whatever its draft,
whoever its neighbours, whenever it was let in, preempted or interrupted, and however its prompt was cut; and at the end
of every trace no page and no draft row is taken. Bugs that are planted are noticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import guesses
from fakes.costs import FREE
from fakes.guesses import FakeGraph
from fakes.pipeline import PLAIN, FakePipeline, LetterTokenizer
from fakes.target import FakeSequence, FakeTarget
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.numpy_target import NumpyTarget
from traces.settings import TRACE_SETTINGS

from dovetail.runtime import load
from dovetail.runtime.decoding import round_planner
from dovetail.runtime.decoding.conversation import Conversation
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.decoding.text_cache import TextCache
from dovetail.runtime.drafts.base import Draft, Foresight, TreeGrowth, blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.drafts.model_draft import ModelDraft, ModelGrowth
from dovetail.runtime.errors import DrawError
from dovetail.runtime.evaluation.standard_library import held_out_files
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.policies.base import Policy, TreeBudget
from dovetail.runtime.policies.chances import Chances
from dovetail.runtime.policies.costs import ASSUMED
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import Step, TargetEngine, read
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import CandidateTree, chain
from dovetail.runtime.trees.verified import Verified

pytestmark = pytest.mark.usefixtures("quiet_drafts")

VOCAB = 12
MOST_STEPS = 3000  # of a trace that ends
PLANTED = "planted"


@dataclasses.dataclass(frozen=True)
class Text:
    """One request of a trace."""

    prompt: tuple[int, ...]
    config: GenerationConfig
    policy: Policy = PLAIN
    draft: str = "none"  # none, graph, or one of the fakes; matches besides if it looks up
    looks_up: bool = False
    answers: int = 1
    arrival: int = 0  # steps before it
    fate: tuple[str, int] | None = None  # cancel, close or drop; steps behind its arrival
    fault: tuple[str, int] | None = None  # of its draft: where, and at which call
    follow_up: tuple[int, ...] | None = None  # a second turn of its conversation: what stands behind the first answer


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests, and what happens while they are answered."""

    texts: list[Text]
    capacity: int = 4096
    max_texts: int = 16
    graph_kind: str = "dgf"
    max_rows: int = 4096  # of the draft's graph
    prompt_tokens: int = round_planner.PROMPT_TOKENS
    prompt_tokens_beside: int = round_planner.PROMPT_TOKENS_BESIDE
    preemptions: frozenset[int] = frozenset()  # steps before which the newest text is preempted
    interrupts: frozenset[int] = frozenset()  # moments: see `Moments`
    graph_fault: int | None = None  # the call of the graph that raises
    free_drafts: bool = False  # by the prices drafting costs nothing


class Moments:
    """Counts the moments at which an interrupt may come: before and behind whatever a step does."""

    def __init__(self, interrupts: frozenset[int]) -> None:
        self._interrupts, self._count = interrupts, 0

    def __call__(self, *what: object) -> None:
        self._count += 1
        if self._count in self._interrupts:
            raise KeyboardInterrupt


class FaultyDraft:
    """See `Draft`. It raises where it is told to, and lets interrupts come."""

    def __init__(self, draft: Draft, fault: tuple[str, int] | None, moment: Moments) -> None:
        self._draft, self._fault, self.moment = draft, fault, moment
        self._calls: dict[str, int] = {}

    def is_due(self, where: str) -> bool:
        self._calls[where] = self._calls.get(where, 0) + 1
        return self._fault == (where, self._calls[where])

    def raise_if_due(self, where: str) -> None:
        self.moment()
        if self.is_due(where):
            raise RuntimeError(PLANTED)

    @property
    def known(self) -> int:
        return self._draft.known

    def tell(self, verified: Verified) -> None:
        self.raise_if_due("tell")
        self._draft.tell(verified)
        self.moment()

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> TreeGrowth:
        self.raise_if_due("grow")
        return FaultyGrowth(self, self._draft.grow(root, budget, foresight))

    def truncate(self, known: int) -> None:
        self._draft.truncate(known)

    def close(self) -> None:
        self._draft.close()


class FaultyGrowth:
    """See `TreeGrowth`."""

    def __init__(self, draft: FaultyDraft, growth: TreeGrowth) -> None:
        self._draft, self._growth = draft, growth

    @property
    def candidates(self) -> CandidateTree:
        return self._growth.candidates

    def next_call(self, alone: bool = True) -> DraftCall | None:
        self._draft.raise_if_due("next_call")
        return self._growth.next_call(alone)

    def take(self, children: Children) -> None:
        self._draft.raise_if_due("take")
        if self._draft.is_due("nan"):
            children = dataclasses.replace(children, log_probs=np.full_like(children.log_probs, np.nan))
        self._growth.take(children)

    def fail(self, error: Exception) -> None:
        self._growth.fail(error)

    def abandon(self) -> None:
        self._growth.abandon()


# The law.


@dataclasses.dataclass
class Outcome:
    """Of one answer."""

    tokens: list[int]
    text: str
    reason: str


def alone(row: Callable[[Sequence[int]], Any], prompt: Sequence[int], config: GenerationConfig, number: int) -> Outcome:
    """Plain decoding without the engine, one token at a time."""
    sampler, context, text = Sampler(config, prompt, VOCAB, number), list(prompt), ""
    tokenizer, ends = LetterTokenizer(), frozenset[int]() if config.ignore_eos else config.eos_token_id
    while True:
        try:
            context.append(sampler.draw(row(context)))
        except DrawError:
            return Outcome(context[len(prompt) :], text, "error")
        tokens = context[len(prompt) :]
        if tokens[-1] in ends:
            return Outcome(tokens, text, "stop")
        text += tokenizer.push([tokens[-1]])
        hits = [text.find(stop) for stop in config.stop_strings if stop in text]
        if hits:
            return Outcome(tokens, text[: min(hits)], "stop")
        if len(tokens) == config.max_new_tokens:
            return Outcome(tokens, text, "length")


@dataclasses.dataclass
class Answer:
    """One stream of a trace; None once it was dropped."""

    text: Text
    prompt: tuple[int, ...]
    number: int
    stream: Stream | None
    sequence: TextSequence
    conversation: Conversation | None

    def outcome(self) -> Outcome:
        assert self.stream is not None
        assert self.stream._reason is not None, "the engine lost a text"
        try:
            done = self.stream.finish()
        except DrawError:
            done = self.stream.finish()
            assert done.finish_reason == "error"
        is_planted = done.draft_failure is not None and (
            PLANTED in done.draft_failure or "numbers" in done.draft_failure
        )
        assert done.draft_failure is None or is_planted, done.draft_failure
        return Outcome(done.token_ids, done.text, done.finish_reason)


class Player:
    """Plays a trace."""

    def __init__(self, trace: Trace, target: TargetEngine | None = None, reference: TargetEngine | None = None) -> None:
        """`target`: in place of the fake one, with features that are not the fakes'; `reference`: the same, unused."""
        self.trace, self.moment = trace, Moments(trace.interrupts)
        fake = FakeTarget(VOCAB, capacity=trace.capacity, remembers=True)
        fake.watch = fake.touch = self.moment
        self.target: TargetEngine = target or fake
        self.row = fake.row if reference is None else functools.partial(row_of, reference)
        self.graph = FakeGraph(guesses.best(fake), VOCAB, max_rows=trace.max_rows, kind=trace.graph_kind)
        self.graph.watch = self._call
        self._calls = 0
        costs = FREE if trace.free_drafts else ASSUMED
        self.pipe = FakePipeline(self.target, graph=self.graph, costs=costs, max_texts=trace.max_texts)
        self.answers: list[Answer] = []
        self.interrupts = self.forced = 0

    def _call(self, calls: Sequence[DraftCall]) -> None:
        self.moment()
        self._calls += 1
        if self._calls == self.trace.graph_fault:
            raise RuntimeError(PLANTED)

    def play(self) -> None:
        step, engine = 0, self.pipe.engine
        while step <= max(text.arrival for text in self.trace.texts) or not engine.is_idle or self._follow_up():
            for text in self.trace.texts:
                if text.arrival == step:
                    self._open(text)
            self._meet_fates(step)
            running = engine._running
            if step in self.trace.preemptions and len(running) > 1:
                engine._preempt(running[-1])
                self.forced += 1
            try:
                engine.step()
            except KeyboardInterrupt:
                self.interrupts += 1
            step += 1
            assert step < MOST_STEPS, "the trace does not end"

    def _open(self, text: Text) -> None:
        conversation = None if text.follow_up is None else self._conversation(text)
        streams = []
        for number in range(text.answers):
            owner = conversation or self._conversation(text)
            stream = self.pipe.stream(text.prompt, text.config, text.policy, conversation=owner, number=number)
            stream._keeps_conversation = conversation is not None
            streams.append(stream)
            self._add(text, text.prompt, number, stream, conversation)
        streams[0].share_prompt(streams[1:])

    def _add(
        self, text: Text, prompt: tuple[int, ...], number: int, stream: Stream, conversation: Conversation | None
    ) -> None:
        stream._sampler.draw = self._with_moments(stream._sampler.draw)  # type: ignore[method-assign]
        self.answers.append(Answer(text, prompt, number, stream, stream._sequence, conversation))

    def _with_moments(self, draw: Callable[[Any], int]) -> Callable[[Any], int]:
        def drawing(logits: Any) -> int:
            self.moment()
            token = draw(logits)
            self.moment()
            return token

        return drawing

    def _conversation(self, text: Text) -> Conversation:
        draft: Draft | None = None
        if text.draft == "graph":
            draft = ModelDraft(self.graph)
        elif text.draft != "none":
            assert isinstance(self.target, FakeTarget)
            draft = getattr(guesses, text.draft)(self.target)
        if draft is not None:
            draft = FaultyDraft(draft, text.fault, self.moment)
        return self.pipe.conversation(draft, text.looks_up)

    def _meet_fates(self, step: int) -> None:
        for answer in self.answers:
            fate = answer.text.fate
            if fate is None or answer.stream is None or step != answer.text.arrival + fate[1]:
                continue
            if fate[0] == "drop":
                answer.stream = None
            elif fate[0] == "cancel":
                answer.stream.cancel()
            else:
                answer.stream.close()

    def _follow_up(self) -> bool:
        """Begin the second turn of the conversations whose first is over; whether there was one."""
        ready = [one for one in self.answers if one.conversation is not None and one.prompt == one.text.prompt]
        opened = False
        for answer in ready:
            if any(other.prompt != other.text.prompt and other.text is answer.text for other in self.answers):
                continue
            assert answer.text.follow_up is not None
            prompt = (*answer.prompt, *answer.sequence.new_tokens, *answer.text.follow_up)
            conversation, text = answer.conversation, answer.text
            stream = self.pipe.stream(prompt, text.config, text.policy, conversation=conversation)
            stream.open()
            self._add(text, prompt, 0, stream, conversation)
            opened = True
        return opened

    def counts(self) -> Counter[str]:
        """What happened."""
        done = [answer.stream.finish() for answer in self.answers if answer.stream is not None]
        counts = Counter(one.finish_reason for one in done)
        counts["interrupts"] = self.interrupts
        counts["forced"] = self.forced
        counts["preemptions"] = sum(answer.sequence.preemptions for answer in self.answers) - self.forced
        counts["failures"] = sum(one.draft_failure is not None for one in done)
        counts["siblings"] = sum(answer.number > 0 and answer.sequence.reused > 0 for answer in self.answers)
        counts["reused"] = sum(answer.prompt != answer.text.prompt for answer in self.answers if answer.sequence.reused)
        counts["accepted"] = sum(one.totals.accepted_tokens for one in done)
        counts["rounds"] = sum(one.totals.rounds for one in done)
        return counts

    def check(self) -> None:
        """The law, for every answer."""
        for answer in self.answers:
            expected = alone(self.row, answer.prompt, answer.text.config, answer.number)
            if answer.stream is None:
                count = len(answer.sequence.new_tokens)
                common = min(count, len(expected.tokens))  # what was drawn behind a stop string does not count
                assert answer.sequence.new_tokens[:common] == expected.tokens[:common]
                continue
            outcome = answer.outcome()
            if outcome.reason == "cancelled":
                assert answer.text.fate is not None
                assert outcome.tokens == expected.tokens[: len(outcome.tokens)]
                assert expected.text.startswith(outcome.text)
                continue
            if outcome.reason == "error":  # a piece that a stop string might have begun with was not let out
                assert expected.text.startswith(outcome.text)
                outcome.text = expected.text
            assert outcome == expected
        for answer in self.answers:
            if answer.conversation is not None:
                answer.conversation.close()
        assert self.target.free == self.target.capacity, "a page leaked"
        assert self.graph.pool.num_free == self.graph.pool.max_blocks, "a row of the draft leaked"


def row_of(target: TargetEngine, context: Sequence[int]) -> Any:
    """[V] logits of the token after `context`, from an empty cache."""
    with contextlib.closing(target.sequence()) as sequence:
        return read(target, sequence, np.array(context)).logits[0].copy()


def holds(trace: Trace, *targets: TargetEngine) -> Player:
    """The law, for one trace. `targets`: see `Player`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_planner, "PROMPT_TOKENS", trace.prompt_tokens)
        patch.setattr(round_planner, "PROMPT_TOKENS_BESIDE", trace.prompt_tokens_beside)
        player = Player(trace, *targets)
        player.play()
        player.check()
    return player


# Traces.


@st.composite
def configs(draw: st.DrawFn) -> GenerationConfig:
    most = draw(st.integers(1, 24))
    controls: dict[str, Any] = {"max_new_tokens": most, "seed": draw(st.integers(0, 1000))}
    controls |= draw(
        st.sampled_from(
            [
                {"temperature": 0.0},
                {"temperature": 0.0, "repetition_penalty": 1.3},
                {"temperature": 0.0, "no_repeat_ngram_size": 1},  # runs out of tokens: a draw that fails
                {"temperature": 1.0},
                {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
                {"temperature": 1.5, "top_k": 4, "no_repeat_ngram_size": 2},
            ]
        )
    )
    if draw(st.booleans()):
        controls["eos_token_id"] = [draw(st.integers(0, VOCAB - 1))]
        controls["min_new_tokens"] = draw(st.integers(0, most))
    if draw(st.booleans()):
        controls["stop_strings"] = [draw(st.sampled_from(["a", "bc", "dd", "hij", "kab"]))]
    return GenerationConfig(**controls)


CHANCES = Chances(tuple(round(0.95**i, 2) for i in range(1, 31)), ((0.5, 0.12, 0.03, 0.01),) * 6)  # short to print
SHAPES = st.sampled_from([TreeShape(1, 0, 1), TreeShape(4, 3, 1), TreeShape(8, 3, 3), TreeShape(24, 6, 4)])


@st.composite
def texts(draw: st.DrawFn) -> Text:
    config, shape = draw(configs()), draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    prompt = rng.integers(0, VOCAB, draw(st.integers(1, 40))).tolist()
    if draw(st.booleans()):
        prompt = (prompt * 3)[:40]  # so that there are matches
    draft = draw(st.sampled_from(["none", "graph", "graph", "graph", "good", "sometimes", "never"]))
    looks_up = draw(st.booleans())
    policy = Policy("lookup") if looks_up else PLAIN
    if draft != "none":
        policy = draw(
            st.sampled_from(
                [
                    Policy("fixed", shape, gain=2.0),
                    Policy("fixed", shape, gain=2.0, is_wish=True),
                    Policy("adaptive", shape, CHANCES, gain=2.0),
                ]
            )
        )
    kind = draw(st.integers(0, 9))
    fate = (draw(st.sampled_from(["cancel", "close", "drop"])), draw(st.integers(0, 12))) if kind == 0 else None
    faults = st.tuples(st.sampled_from(["tell", "grow", "next_call", "take", "nan"]), st.integers(1, 6))
    return Text(
        prompt=tuple(prompt),
        config=config,
        policy=policy,
        draft=draft,
        looks_up=looks_up,
        answers=draw(st.integers(2, 3)) if kind in (1, 2) and config.temperature else 1,
        arrival=draw(st.integers(0, 15)),
        fate=fate,
        fault=draw(faults) if kind in (3, 4) else None,
        follow_up=tuple(rng.integers(0, VOCAB, 3).tolist()) if kind == 5 else None,
    )


TRACES = st.builds(
    Trace,
    texts=st.lists(texts(), min_size=1, max_size=8),
    capacity=st.sampled_from([160, 200, 240, 4096]),
    max_texts=st.sampled_from([1, 4, 16]),
    graph_kind=st.sampled_from(["dgf", "dgf", "lm"]),
    max_rows=st.sampled_from([64, 256, 4096]),
    prompt_tokens=st.sampled_from([3, 7, 256]),
    prompt_tokens_beside=st.sampled_from([3, 5, 64]),
    preemptions=st.frozensets(st.integers(0, 30), max_size=5),
    interrupts=st.frozensets(st.integers(0, 600), max_size=12),
    graph_fault=st.one_of(st.none(), st.none(), st.none(), st.integers(1, 60)),
    free_drafts=st.booleans(),
)


COUNTS: Counter[str] = Counter()


@settings(TRACE_SETTINGS, max_examples=300)
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
    assert COUNTS["traces"] == 300
    for what in ("interrupts", "preemptions", "forced", "failures", "siblings", "reused", "cancelled", "error", "stop"):
        assert COUNTS[what] >= 10, what
    assert COUNTS["accepted"] > COUNTS["rounds"] / 5


@settings(TRACE_SETTINGS, max_examples=30)
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


# The shipped artifact, in `fast` numerics: bit for bit.


@pytest.fixture(scope="module")
def shipped(shipped_artifact: Path) -> Iterator[Pipeline]:
    """With its draft and matches, eight texts at a time, and a cache that holds two long ones."""
    with load(shipped_artifact, ctx_size=256, sequences=2) as pipe:
        pipe.engine._max_texts = 8
        yield pipe


@pytest.fixture(scope="module")
def shipped_plain(shipped_artifact: Path) -> Iterator[Pipeline]:
    with load(shipped_artifact, ctx_size=256, draft="none") as pipe:
        yield pipe


@dataclasses.dataclass(frozen=True)
class CodeText:
    """One request."""

    file: int
    length: int  # tokens of the prompt
    config: GenerationConfig
    arrival: int
    answers: int
    is_cancelled: bool


CODE_TEXTS = st.builds(
    CodeText,
    file=st.integers(0, 19),
    length=st.integers(1, 120),
    config=st.builds(
        GenerationConfig,
        max_new_tokens=st.integers(1, 20),
        temperature=st.sampled_from([0.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        seed=st.integers(0, 1000),
        ignore_eos=st.just(True),
        logprobs=st.just(3),
    ),
    arrival=st.integers(0, 8),
    answers=st.integers(1, 2),
    is_cancelled=st.sampled_from([False, False, False, True]),
)


@settings(TRACE_SETTINGS, max_examples=20)
@given(
    st.lists(CODE_TEXTS, min_size=1, max_size=5),
    st.frozensets(st.integers(0, 12), max_size=3),
    st.frozensets(st.integers(0, 40), max_size=2),
    st.sampled_from([5, 32, 64]),
)
def test_so_it_is_with_the_shipped_artifact(
    shipped: Pipeline,
    shipped_plain: Pipeline,
    texts: list[CodeText],
    preemptions: frozenset[int],
    interrupts: frozenset[int],
    prompt_tokens_beside: int,
) -> None:
    codes = [shipped.encode(text[:2000]) for _, text in itertools.islice(held_out_files(), 20)]
    moment, engine, target = Moments(interrupts), shipped.engine, shipped.target
    answers: list[tuple[CodeText, int, Stream]] = []
    forward, step = type(target).forward, 0

    def interrupted(self: Any, *arguments: Any) -> Any:
        moment()
        out = forward(self, *arguments)
        moment()
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(target), "forward", interrupted)
        patch.setattr(round_planner, "PROMPT_TOKENS_BESIDE", prompt_tokens_beside)
        while step <= 8 or not engine.is_idle:
            for text in texts:
                if text.arrival == step:
                    ids = codes[text.file % len(codes)][: text.length]
                    count = text.answers if text.config.temperature else 1
                    streams = [shipped.stream(ids, text.config, sequence=number) for number in range(count)]
                    answers += [(text, number, stream) for number, stream in enumerate(streams)]
                    streams[0].share_prompt(streams[1:])
                elif text.is_cancelled and text.arrival + 5 == step:
                    for other, _, stream in answers:
                        if other is text:
                            stream.cancel()
            if step in preemptions and len(engine._running) > 1:
                engine._preempt(engine._running[-1])
            with contextlib.suppress(KeyboardInterrupt):
                engine.step()
            step += 1
    assert target.free == target.capacity
    assert shipped.draft is not None
    assert shipped.draft.pool.num_free == shipped.draft.pool.max_blocks
    for text, number, stream in answers:
        done = stream.finish()
        ids = codes[text.file % len(codes)][: text.length]
        expected = shipped_plain.stream(ids, text.config, sequence=number).finish()
        assert done.token_ids == expected.token_ids[: len(done.token_ids)]
        assert done.logprobs == expected.logprobs[: len(done.token_ids)]
        assert done.finish_reason in (("length", "cancelled") if text.is_cancelled else ("length",))
        assert len(done.token_ids) == text.config.max_new_tokens or text.is_cancelled
