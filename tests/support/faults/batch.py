"""Texts in one pipeline, into which a fault is planted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fakes.guesses import FakeGraph
from fakes.pipeline import FakePipeline
from faults.drafts import FaultyDraft

from dovetail.runtime.decoding.conversation import Conversation
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.drafts.base import Draft
from dovetail.runtime.drafts.graph_contract import Children, DraftCall

VOCAB, TEXTS = 12, 5


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
    drafts: list[PlantedDraft] = dataclasses.field(default_factory=list)
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


class PlantedDraft(FaultyDraft):
    """`faults`: what is called before a method, by its name."""

    def __init__(self, draft: Draft) -> None:
        super().__init__(draft)
        self.faults: dict[str, Callable[[], object]] = {}

    def before(self, name: str) -> None:
        self.faults.get(name, lambda: None)()


class FaultyGraph(FakeGraph):
    """`spoil` sees every answer of a call; `at` is the call from which on it does."""

    spoil: Callable[[list[Children]], list[Children]] | None = None
    at = 0

    def run(self, calls: Sequence[DraftCall]) -> list[Children]:
        answers = super().run(calls)
        self.at -= 1
        return answers if self.spoil is None or self.at > 0 else self.spoil(answers)
