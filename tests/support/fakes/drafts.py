"""Drafts without a model, and texts that an engine makes with them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dovetail.runtime.decoding.engine import Engine, Update
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.decoding.text_cache import TextCache
from dovetail.runtime.drafts.base import Draft, Foresight, Grown, TreeGrowth, blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.policies.base import Policy, TreeBudget
from dovetail.runtime.policies.costs import ASSUMED, Costs
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import TargetEngine
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import CandidateTree
from dovetail.runtime.trees.verified import Verified

Guess = Callable[[Sequence[int]], Sequence[tuple[int, float]]]
"""A text's tokens -> what may follow, with its probability."""

FIXED = Policy("fixed", TreeShape(8, 3, 2))


class FakeGraph:
    """Answers nothing: a fake draft's growth knows its children itself. `error` is raised by every call, if given."""

    native_s = 0.0
    bytes_in = bytes_out = 0

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls = 0

    def run(self, calls: Sequence[DraftCall]) -> list[Children]:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return [Children(np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))] * len(calls)


class FakeDraft:
    """See `Draft`. Keeps the text, and guesses by it."""

    def __init__(self, guess: Guess) -> None:
        self.guess = guess
        self.text: list[int] = []
        self.asked = 0  # trees that were wanted

    @property
    def known(self) -> int:
        return max(len(self.text) - 1, 0)

    def tell(self, verified: Verified) -> None:
        assert verified.begin <= self.known, "what lies between was not told"
        overlap = self.text[verified.begin :]
        assert overlap == verified.tokens[: len(overlap)].tolist(), "another text than before"
        self.text[verified.begin :] = verified.tokens.tolist()

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> TreeGrowth:
        if not self.text:  # a prompt of one token: nothing was verified yet
            return Grown(CandidateTree(root))
        assert root == self.text[-1], "the root was told of"
        self.asked += 1
        return FakeGrowth(self, root, budget, foresight)

    def truncate(self, known: int) -> None:
        assert 0 <= known <= self.known
        del self.text[known + 1 if known else 0 :]

    def close(self) -> None:
        self.text.clear()


class FakeGrowth:
    """See `TreeGrowth`. A call a level."""

    def __init__(self, draft: FakeDraft, root: int, budget: TreeBudget, foresight: Foresight) -> None:
        self.candidates = CandidateTree(root)
        self._draft, self._budget, self._foresight = draft, budget, foresight
        self._is_over = False

    def next_call(self, alone: bool = True) -> DraftCall | None:
        if self._is_over or not self._budget.wants_level(self.candidates.levels):
            return None
        return DraftCall([0], None, [0], [0], [0], [b"\1"], wanted=1, children=self._budget.width)

    def take(self, children: Children) -> None:
        expanded = self.candidates.frontier(self._budget.width) if self.candidates.depth else [0]
        paths = [self.candidates.path_of(candidate) for candidate in expanded]
        rows = [self._draft.guess([*self._draft.text, *path]) for path in paths]
        offered = Children(
            np.array([[token for token, _ in row] for row in rows], np.int32),
            np.array([[math.log(chance) for _, chance in row] for row in rows], np.float32),
        )
        self.candidates.extend(expanded, *offered.best(self._budget.width, paths, self._foresight))

    def fail(self, error: Exception) -> None:
        raise error

    def abandon(self) -> None:
        self._is_over = True


def knows(text: Sequence[int], chance: float = 0.9, *, vocab: int = 32) -> Guess:
    """Who has read the text before; its second guess is the neighbour's."""

    def guess(before: Sequence[int]) -> Sequence[tuple[int, float]]:
        right = text[len(before)] if len(before) < len(text) else 0
        return [(right, chance), ((right + 1) % vocab, (1 - chance) / 2)]

    return guess


def misses(text: Sequence[int], chance: float = 0.9, *, vocab: int = 32) -> Guess:
    """Is as sure, and always wrong."""

    def guess(before: Sequence[int]) -> Sequence[tuple[int, float]]:
        right = text[len(before)] if len(before) < len(text) else 0
        return [((right + 2) % vocab, chance), ((right + 1) % vocab, (1 - chance) / 2)]

    return guess


class Reader:
    """Keeps what the steps of an engine brought one text."""

    def __init__(self, sequence: TextSequence) -> None:
        self.sequence = sequence
        self.updates: list[Update] = []
        self.is_over = False

    def receive(self, update: Update) -> None:
        self.updates.append(update)

    def end(self) -> None:
        self.is_over = True
        self.sequence.cache.close()

    @property
    def tokens(self) -> list[int]:
        return self.sequence.new_tokens

    @property
    def text(self) -> list[int]:
        return self.sequence.text

    @property
    def nodes(self) -> list[int]:
        """Of every round's tree."""
        return [update.nodes for update in self.updates if update.nodes]

    @property
    def failure(self) -> str | None:
        model = self.sequence.cache.model
        return None if model is None else model.failure


@dataclasses.dataclass
class Texts:
    """What an engine makes behind prompts, with drafts of the test's own."""

    target: TargetEngine
    config: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    policy: Policy = FIXED
    costs: Costs = ASSUMED
    looks_up: bool = False
    graph: Any = dataclasses.field(default_factory=FakeGraph)

    def make(self, prompts: Sequence[Sequence[int]], count: int, drafts: Sequence[Draft | None]) -> list[Reader]:
        """`count` tokens behind each prompt, together."""
        engine = Engine(self.target, RoundPlanner(self.costs), self.graph, max_texts=len(prompts))
        readers = []
        for number, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
            sampler = Sampler(self.config, prompt, self.target.info.vocab_size, number)
            sequence = TextSequence(
                prompt,
                TextCache(self.target.sequence(), draft, LookupDraft() if self.looks_up else None),
                sampler=sampler,
                pace=Pace(self.policy if draft is not None or self.looks_up else Policy("plain")),
                max_new_tokens=count,
                foresight=sampler.foresee if self.config.temperature > 0 else blind,
            )
            readers.append(Reader(sequence))
            engine.add(sequence, readers[-1].receive, readers[-1].end)
        for _ in itertools.takewhile(lambda _: not engine.is_idle, itertools.count()):
            engine.step()
        assert all(reader.is_over for reader in readers)
        return readers
