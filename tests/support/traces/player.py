"""Plays a trace, and holds every answer of it against plain decoding, alone and one token at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fakes import guesses
from fakes.costs import FREE
from fakes.guesses import FakeGraph
from fakes.pipeline import FakePipeline, LetterTokenizer
from fakes.target import FakeTarget
from faults.drafts import FaultyDraft
from traces.trace import VOCAB, Text, Trace

from dovetail.runtime.decoding import round_planner
from dovetail.runtime.decoding.conversation import Conversation
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.drafts.base import Draft
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.errors import DrawError
from dovetail.runtime.policies.costs import ASSUMED
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import TargetEngine, read
from dovetail.runtime.trees.verified import Verified

MOST_STEPS = 3000  # of a trace that ends
PLANTED = "planted"


class Moments:
    """Counts the moments at which an interrupt may come: before and behind whatever a step does."""

    def __init__(self, interrupts: frozenset[int]) -> None:
        self._interrupts, self._count = interrupts, 0

    def __call__(self, *what: object) -> None:
        self._count += 1
        if self._count in self._interrupts:
            raise KeyboardInterrupt


class TracedDraft(FaultyDraft):
    """Raises where it is told to, and lets interrupts come."""

    def __init__(self, draft: Draft, fault: tuple[str, int] | None, moment: Moments) -> None:
        super().__init__(draft)
        self._fault, self._moment = fault, moment
        self._calls = Counter[str]()

    def _is_due(self, where: str) -> bool:
        self._calls[where] += 1
        return self._fault == (where, self._calls[where])

    def before(self, name: str) -> None:
        if name != "truncate":  # test_faults.py lets that fail
            self._moment()
            if self._is_due(name):
                raise RuntimeError(PLANTED)

    def answered(self, children: Children) -> Children:
        if self._is_due("nan"):
            return dataclasses.replace(children, log_probs=np.full_like(children.log_probs, np.nan))
        return children

    def tell(self, verified: Verified) -> None:
        super().tell(verified)
        self._moment()


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
            draft = TracedDraft(draft, text.fault, self.moment)
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
