"""The kinds of faults. Each is planted at a random moment of a batch whose texts are ready, and not begun."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from fakes.pipeline import LetterTokenizer
from faults.batch import TEXTS, VOCAB, Batch, PlantedError

from dovetail.runtime.drafts.base import Grown, TreeGrowth
from dovetail.runtime.drafts.graph_contract import Children
from dovetail.runtime.errors import PassAbandonedError
from dovetail.runtime.targets.base import Step, StepOutput
from dovetail.runtime.trees.tree import CandidateTree


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
