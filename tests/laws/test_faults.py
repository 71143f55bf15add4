"""Proves that what goes wrong with one text stays with it: two dozen kinds of faults, each at a random moment of a
batch of texts. The neighbours' texts are what they are alone, nothing hangs, no page and no draft row leaks, and the
engine makes the next text as if nothing had been. `--fault-seeds 200` plays more batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from fakes.costs import FREE
from fakes.guesses import FakeGraph, best
from fakes.pipeline import FakePipeline, LetterTokenizer
from fakes.target import FakeTarget
from oracles.numpy_target import NumpyTarget

from dovetail.runtime.decoding.conversation import Conversation
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.drafts.base import Draft, Foresight, Grown, TreeGrowth, blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.errors import PassAbandonedError
from dovetail.runtime.policies.base import Policy, TreeBudget
from dovetail.runtime.policies.chances import Chances
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.targets.base import Step, StepOutput, TargetEngine
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import CandidateTree
from dovetail.runtime.trees.verified import Verified

pytestmark = pytest.mark.usefixtures("quiet_drafts")

VOCAB, TEXTS = 12, 5
MOST_STEPS = 1500  # of a batch that ends
CHANCES = Chances(tuple(round(0.95**i, 2) for i in range(1, 31)), ((0.5, 0.12, 0.03, 0.01),) * 6)
POLICIES = [
    Policy("fixed", TreeShape(8, 3, 3), gain=2.0, is_wish=True),
    Policy("fixed", TreeShape(24, 6, 4), gain=2.0),
    Policy("adaptive", TreeShape(16, 5, 2), CHANCES, gain=2.0),
]


class PlantedError(Exception):
    """What the faults raise."""


@dataclasses.dataclass
class Batch:
    """Texts in one pipeline, a fault, and what may come of it."""

    rng: np.random.Generator
    pipe: FakePipeline
    target: Any
    graph: FaultyGraph
    victim: int
    streams: list[Stream | None] = dataclasses.field(default_factory=list)
    conversations: list[Conversation] = dataclasses.field(default_factory=list)
    drafts: list[FaultyDraft] = dataclasses.field(default_factory=list)
    at_step: dict[int, Callable[[], object]] = dataclasses.field(default_factory=dict)  # what happens before a step
    touched: set[int] = dataclasses.field(default_factory=set)  # texts that may end before their end
    happened: int = 0  # how often the fault came

    def moment(self, most: int = 12) -> int:
        """When it comes: a number of calls, passes or steps."""
        return int(self.rng.integers(1, most))

    def touch(self) -> None:
        """The victim need not come to its end."""
        self.touched.add(self.victim)

    def hit(self, *_: object) -> None:
        self.happened += 1

    def fail(self, *_: object) -> None:
        self.hit()
        raise PlantedError


class FaultyDraft:
    """See `Draft`. `faults`: what is called before a method, by its name; `grown` may put another tree there."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self.faults: dict[str, Callable[[], object]] = {}
        self.grown: Callable[[int, TreeGrowth], TreeGrowth] = lambda root, growth: growth

    def before(self, name: str) -> None:
        self.faults.get(name, lambda: None)()

    @property
    def known(self) -> int:
        return self._draft.known

    def tell(self, verified: Verified) -> None:
        self.before("tell")
        self._draft.tell(verified)

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> TreeGrowth:
        self.before("grow")
        return self.grown(root, FaultyGrowth(self, self._draft.grow(root, budget, foresight)))

    def truncate(self, known: int) -> None:
        self.before("truncate")
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
        self._draft.before("next_call")
        return self._growth.next_call(alone)

    def take(self, children: Children) -> None:
        self._draft.before("take")
        self._growth.take(children)

    def fail(self, error: Exception) -> None:
        self._growth.fail(error)

    def abandon(self) -> None:
        self._growth.abandon()


class FaultyGraph(FakeGraph):
    """`spoil` sees every answer of a call; `at` is the call from which on it does."""

    spoil: Callable[[list[Children]], list[Children]] | None = None
    at = 0

    def run(self, calls: Sequence[DraftCall]) -> list[Children]:
        answers = super().run(calls)
        self.at -= 1
        return answers if self.spoil is None or self.at > 0 else self.spoil(answers)


# The kinds of faults. Each is planted in a batch whose texts are ready, and not begun.


def once(at: int, what: Callable[..., object]) -> Callable[..., object]:
    """`what` at the call numbered `at`, and at no other."""
    calls = Counter[str]()

    def counted(*arguments: object) -> object:
        calls["all"] += 1
        return what(*arguments) if calls["all"] == at else None

    return counted


def draft_raises(where: str, most: int = 5) -> Callable[[Batch], None]:
    def plant(batch: Batch) -> None:
        batch.drafts[batch.victim].faults[where] = once(batch.moment(most), batch.fail)

    return plant


def draft_answers(change: Callable[[Batch, Children], Children]) -> Callable[[Batch], None]:
    """One text of a call gets another answer."""

    def plant(batch: Batch) -> None:
        def spoil(answers: list[Children]) -> list[Children]:
            which = int(batch.rng.integers(len(answers)))
            if answers[which].tokens.size:
                batch.hit()
                answers[which] = change(batch, answers[which])
            return answers

        batch.graph.spoil, batch.graph.at = spoil, batch.moment(8)

    return plant


def nan_somewhere(batch: Batch, children: Children) -> Children:
    log_probs = children.log_probs.copy()
    log_probs.flat[batch.rng.integers(log_probs.size)] = batch.rng.choice([np.nan, np.inf, -np.inf])
    return dataclasses.replace(children, log_probs=log_probs)


def above_certain(batch: Batch, children: Children) -> Children:
    """Then a child is better than its parent."""
    return dataclasses.replace(children, log_probs=children.log_probs + np.float32(batch.rng.uniform(0, 5)))


def fewer_rows(batch: Batch, children: Children) -> Children:
    return dataclasses.replace(children, tokens=children.tokens[1:], log_probs=children.log_probs[1:])


def other_widths(batch: Batch, children: Children) -> Children:
    return dataclasses.replace(children, tokens=children.tokens[:, :1])


def flat(batch: Batch, children: Children) -> Children:
    return dataclasses.replace(children, tokens=children.tokens.ravel(), log_probs=children.log_probs.ravel())


def beyond_the_vocabulary(batch: Batch, children: Children) -> Children:
    tokens = children.tokens.copy()
    tokens.flat[batch.rng.integers(tokens.size)] = batch.rng.choice([-1, VOCAB, 1 << 30, -(1 << 31)])
    return dataclasses.replace(children, tokens=tokens)


def twins(batch: Batch, children: Children) -> Children:
    return dataclasses.replace(children, tokens=np.full_like(children.tokens, batch.rng.integers(VOCAB)))


def graph_raises(batch: Batch) -> None:
    batch.graph.spoil, batch.graph.at = once(1, batch.fail), batch.moment(8)  # type: ignore[assignment]
    spoil = batch.graph.spoil
    batch.graph.spoil = lambda answers: spoil(answers) or answers  # type: ignore[misc]


def graph_answers_too_few(batch: Batch) -> None:
    def spoil(answers: list[Children]) -> list[Children]:
        batch.hit()
        return answers[:-1]

    batch.graph.spoil, batch.graph.at = spoil, batch.moment(8)


def huge_tree(batch: Batch) -> None:
    def grown(root: int, growth: TreeGrowth) -> TreeGrowth:
        batch.hit()
        growth.abandon()
        candidates, level = CandidateTree(root), [0]
        for width in (30, 40):
            count = len(level) * width
            first = candidates.add_level(
                [parent for parent in level for _ in range(width)],
                batch.rng.integers(0, VOCAB, count).tolist(),
                (-batch.rng.random(count)).tolist(),
            )
            level = list(range(first, first + count))
        return Grown(candidates)

    batch.drafts[batch.victim].grown = grown


def target_row_is_no_number(batch: Batch) -> None:
    """Of the victim, in one pass; behind the root such a row only ends the round."""
    batch.touch()
    forward, due = batch.target.forward, once(batch.moment(6), lambda: True)

    def spoilt(steps: Sequence[Step], rows: int = 0) -> list[StepOutput]:
        outputs: list[StepOutput] = forward(steps, rows)
        mine = [out for step, out in zip(steps, outputs, strict=True) if step.sequence is victim_of(batch)]
        if mine and len(mine[0].logits) and due():
            batch.hit()
            mine[0].logits[batch.rng.integers(len(mine[0].logits))][batch.rng.integers(VOCAB)] = batch.rng.choice(
                [np.nan, np.inf]
            )
        return outputs

    batch.target.forward = spoilt


def victim_of(batch: Batch) -> object:
    stream = batch.streams[batch.victim]
    return None if stream is None else stream._sequence.cache.target


def target_raises(batch: Batch) -> None:
    """Then all that run end with it; who waits goes on."""
    batch.touched.update(range(TEXTS))
    forward, due = batch.target.forward, once(batch.moment(), batch.fail)
    error = batch.rng.choice([PlantedError, MemoryError, RuntimeError])
    is_before = bool(batch.rng.integers(2))

    def raising(steps: Sequence[Step], rows: int = 0) -> list[StepOutput]:
        outputs: list[StepOutput] = [] if is_before else forward(steps, rows)
        try:
            due()
        except PlantedError:
            raise error from None
        return forward(steps, rows) if is_before else outputs

    batch.target.forward = raising


def pass_abandoned(batch: Batch) -> None:
    """Though somebody waits for it: a cancel that came too late for the pass that it meant."""
    forward, due = batch.target.forward, once(batch.moment(), lambda: True)

    def ending(steps: Sequence[Step], rows: int = 0) -> list[StepOutput]:
        outputs: list[StepOutput] = forward(steps, rows)
        if due():
            batch.hit()
            raise PassAbandonedError
        return outputs

    batch.target.forward = ending


def cancelled(batch: Batch) -> None:
    batch.touch()
    stream = batch.streams[batch.victim]
    assert stream is not None
    batch.at_step[batch.moment()] = lambda: (batch.hit(), stream.cancel())


def closed(batch: Batch) -> None:
    batch.touch()
    stream = batch.streams[batch.victim]
    assert stream is not None
    batch.at_step[batch.moment()] = lambda: (batch.hit(), stream.close())


def closed_in_a_step(batch: Batch) -> None:
    batch.touch()
    stream = batch.streams[batch.victim]
    assert stream is not None
    batch.target.watch = once(batch.moment(20), lambda steps: (batch.hit(), stream.close()))


def dropped(batch: Batch) -> None:
    batch.touch()

    def drop() -> None:
        batch.hit()
        batch.streams[batch.victim] = None

    batch.at_step[batch.moment()] = drop


def conversation_closed(batch: Batch) -> None:
    batch.touch()
    batch.at_step[batch.moment()] = lambda: (batch.hit(), batch.conversations[batch.victim].close())


def interrupted(batch: Batch) -> None:
    """Anywhere in a step. Nobody reads here, so no text ends by it."""
    due = once(batch.moment(150), lambda: True)

    def interrupt(*_: object) -> None:
        if due():
            batch.hit()
            raise KeyboardInterrupt

    batch.target.watch = batch.target.touch = batch.graph.watch = interrupt


class FailingTokenizer(LetterTokenizer):
    def __init__(self, due: Callable[..., object]) -> None:
        self._due = due

    def push(self, ids: Sequence[int]) -> str:
        self._due()
        return super().push(ids)


def reader_raises(batch: Batch) -> None:
    batch.touch()
    stream = batch.streams[batch.victim]
    assert stream is not None
    stream._detokenizer = FailingTokenizer(once(batch.moment(6), batch.fail))  # type: ignore[assignment]


def reader_interrupted(batch: Batch) -> None:
    """It loses a chunk and ends; the others' chunks are told by the next step."""
    batch.touch()

    def interrupt() -> None:
        batch.hit()
        raise KeyboardInterrupt

    stream = batch.streams[batch.victim]
    assert stream is not None
    stream._detokenizer = FailingTokenizer(once(batch.moment(6), interrupt))  # type: ignore[assignment]


def nothing(batch: Batch) -> None:
    """The fault is in how the batch is made: see `SIZES`; all texts have stop strings in it that end rounds."""
    batch.hit()


KINDS: dict[str, Callable[[Batch], None]] = {
    "a draft raises when it is told": draft_raises("tell"),
    "a draft raises when it grows": draft_raises("grow"),
    "a draft raises before a call": draft_raises("next_call"),
    "a draft raises behind a call": draft_raises("take"),
    "a draft raises when it forgets what is behind a stop string": draft_raises("truncate", 2),
    "no numbers": draft_answers(nan_somewhere),
    "chances above one": draft_answers(above_certain),
    "too few rows": draft_answers(fewer_rows),
    "tokens and chances of other widths": draft_answers(other_widths),
    "one dimension too few": draft_answers(flat),
    "tokens beyond the vocabulary": draft_answers(beyond_the_vocabulary),
    "all siblings the same": draft_answers(twins),
    "a huge tree": huge_tree,
    "a shared call raises": graph_raises,
    "a shared call answers too few": graph_answers_too_few,
    "a row of the target is no number": target_row_is_no_number,
    "the target raises": target_raises,
    "a pass is abandoned": pass_abandoned,
    "the cache is full": nothing,
    "the draft's rows are full": nothing,
    "stop strings in the middle of rounds": nothing,
    "cancelled": cancelled,
    "closed": closed,
    "closed in the middle of a step": closed_in_a_step,
    "dropped": dropped,
    "its conversation closed": conversation_closed,
    "interrupted": interrupted,
    "its reader raises": reader_raises,
    "its reader is interrupted": reader_interrupted,
}
SIZES: dict[str, dict[str, int]] = {
    "the cache is full": {"capacity": 180},
    "the draft's rows are full": {"max_rows": 64},
}


# A batch.


def request(rng: np.random.Generator, kind: str) -> tuple[list[int], GenerationConfig, Policy]:
    prompt = rng.integers(0, VOCAB, rng.integers(1, 40)).tolist()
    config = GenerationConfig(
        max_new_tokens=int(rng.integers(5, 30)),
        temperature=float(rng.choice([0.0, 0.0, 1.0])),
        seed=int(rng.integers(1000)),
        stop_strings=("bc", "dd", "hij", "ka") if "stop" in kind or rng.integers(4) == 0 else (),
        eos_token_id=frozenset({int(rng.integers(VOCAB))}) if rng.integers(4) == 0 else frozenset(),
    )
    return prompt, config, POLICIES[rng.integers(len(POLICIES))]


def expected_of(target: TargetEngine, prompt: list[int], config: GenerationConfig) -> tuple[list[int], str]:
    """What a text is in a pipeline of its own, without a draft."""
    done = FakePipeline(target).stream(prompt, config).finish()
    return done.token_ids, done.text


def targets(computes: bool, **sizes: int) -> tuple[TargetEngine, TargetEngine]:
    """(the one that is disturbed, the same for comparison)."""
    capacity = sizes.get("capacity", 4096)
    if computes:
        return tuple(NumpyTarget.random(vocab_size=VOCAB, capacity=size) for size in (capacity, 4096))  # type: ignore[return-value]
    return FakeTarget(VOCAB, capacity=capacity, remembers=True), FakeTarget(VOCAB, remembers=True)


def play(kind: str, seed: int, computes: bool = False) -> Batch:
    """One batch, disturbed, and the law."""
    rng, sizes = np.random.default_rng([seed, list(KINDS).index(kind)]), SIZES.get(kind, {})
    target, reference = targets(computes, **sizes)
    guess = best(FakeTarget(VOCAB))
    graph = FaultyGraph(guess, VOCAB, max_rows=sizes.get("max_rows", 4096), kind="lm" if computes else "dgf")
    pipe = FakePipeline(target, graph=graph, costs=FREE, max_texts=int(rng.choice([2, 16])))
    batch = Batch(rng, pipe, target, graph, int(rng.integers(TEXTS)))
    requests = [request(rng, kind) for _ in range(TEXTS)]
    for prompt, config, policy in requests:
        batch.drafts.append(FaultyDraft(ModelDraft(graph)))
        batch.conversations.append(pipe.conversation(batch.drafts[-1], bool(rng.integers(2))))
        batch.streams.append(pipe.stream(prompt, config, policy, conversation=batch.conversations[-1]))
    KINDS[kind](batch)
    for stream in batch.streams:
        assert stream is not None
        stream.open()
    del stream
    drive(batch)
    check(batch, [expected_of(reference, prompt, config) for prompt, config, _ in requests])
    undisturbed(batch)
    prompt, config, policy = requests[batch.victim]
    again = pipe.stream(prompt, config, policy, model=ModelDraft(graph)).finish()
    assert (again.token_ids, again.text) == expected_of(reference, prompt, config), "the engine is usable behind it"
    assert_nothing_is_taken(batch)
    return batch


def drive(batch: Batch) -> None:
    for step in range(MOST_STEPS):
        batch.at_step.get(step, lambda: None)()
        with contextlib.suppress(KeyboardInterrupt):
            batch.pipe.engine.step()
        if batch.pipe.engine.is_idle and not batch.pipe.engine._undelivered:
            return
    raise AssertionError("it hangs")


def check(batch: Batch, expected: list[tuple[list[int], str]]) -> None:
    for number, (stream, (tokens, text)) in enumerate(zip(batch.streams, expected, strict=True)):
        if stream is None:
            continue
        try:
            done = stream.finish()
        except Exception:
            assert number in batch.touched
            done = stream.finish()  # raised once
        if number in batch.touched and done.finish_reason in ("cancelled", "error"):
            assert done.token_ids == tokens[: len(done.token_ids)]
            assert text.startswith(done.text)
        else:
            assert (done.token_ids, done.text) == (tokens, text), f"text {number}, the victim {batch.victim}"
            assert done.finish_reason in ("stop", "length")


def undisturbed(batch: Batch) -> None:
    """End the faults, and give the conversations back."""
    for name in ("forward", "watch", "touch"):
        batch.target.__dict__.pop(name, None)
    if isinstance(batch.target, FakeTarget):
        batch.target.watch = batch.target.touch = lambda *_: None
    batch.graph.spoil, batch.graph.watch = None, lambda calls: None
    for draft in batch.drafts:
        draft.faults, draft.grown = {}, lambda root, growth: growth
    for conversation in batch.conversations:
        conversation.close()
    assert_nothing_is_taken(batch)


def assert_nothing_is_taken(batch: Batch) -> None:
    batch.pipe.engine.sweep()
    assert batch.pipe.engine.is_idle
    assert batch.target.free == batch.target.capacity, "a page leaked"
    assert batch.graph.pool.num_free == batch.graph.pool.max_blocks, "a row of the draft leaked"


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> Iterator[int]:
    return iter(range(request.config.getoption("--fault-seeds")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_stays_where_it_is(kind: str, seeds: Iterator[int]) -> None:
    happened = played = 0
    for seed in seeds:
        batch = play(kind, seed)
        happened, played = happened + (batch.happened > 0), played + 1
    assert happened >= played / 2, "a law about what never happens would prove nothing"


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("interrupted", "closed in the middle of a step")]
)
def test_so_it_does_on_a_target_that_computes(kind: str) -> None:
    """A Llama in numpy; it has no moments in the middle of a pass."""
    play(kind, 0, computes=True)
