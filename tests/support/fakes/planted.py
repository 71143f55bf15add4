"""A target and a draft made of sleeps and dice: what they cost and how often they agree is known exactly.

The sleeps are of a clock that only they move (`use_own_clock`), so that a busy machine does not bend them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from fakes.target import D, FakeTarget, row_after

from dovetail.calibration.measure.pair import DraftReader, EngineRounds, Run, Text
from dovetail.runtime.artifact.manifest import DraftInfo
from dovetail.runtime.decoding.engine import Engine, Update
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.decoding.text_cache import TextCache
from dovetail.runtime.drafts.base import blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.drafts.joint_calls import JointCalls
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.drafts.row_pool import RowPool
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.policies.costs import ASSUMED, Costs
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import Step, StepOutput

VOCAB = 12
CONFIDENT, UNSURE = 0.95, 0.4
"""The draft's first child is the target's best token with one of these chances, and the draft knows which."""


class Clock:
    """Time that passes in sleeps, and a microsecond whenever somebody looks."""

    def __init__(self) -> None:
        self._now = 1.0

    def perf_counter(self) -> float:
        self._now += 1e-6
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += max(seconds, 0.0)


def use_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the planted costs be all that takes time."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(time, "sleep", clock.sleep)


class SlowTarget(FakeTarget):
    """`pass_ms(rows)` for every pass, however many texts share it, and `switch_ms` if the last had other rows."""

    def __init__(self, pass_ms: Callable[[int], float], switch_ms: float = 0.0) -> None:
        super().__init__(VOCAB, capacity=1 << 16)
        self._pass_ms, self._switch_ms = pass_ms, switch_ms
        self._last_rows = 0

    def forward(self, steps: Sequence[Step], rows: int = 0) -> list[StepOutput]:
        rows = max(rows, sum(len(step.tree) for step in steps))
        time.sleep((self._pass_ms(rows) + (self._switch_ms if rows != self._last_rows else 0.0)) / 1e3)
        self._last_rows = rows
        return super().forward(steps)


class PlantedGraph:
    """See `DraftGraph`: knows what the pair's draft would say, and takes its time."""

    device = "planted"
    bytes_in = bytes_out = 0

    def __init__(self, pair: PlantedPair) -> None:
        self.info = DraftInfo("lm", D, VOCAB, 1, 1, 1, pair.width, 1, "float32")
        self.pool = RowPool(1 << 16)
        self.native_s = 0.0
        self._pair = pair
        self._texts: dict[int, tuple[int, int]] = {}  # row of the pool -> position, token

    def run(self, calls: Sequence[DraftCall]) -> list[Children]:
        """See `DraftGraph`."""
        start = time.perf_counter()
        answers, first = [], 0
        for call in calls:
            for row, position, token in zip(call.rows, call.positions, call.tokens, strict=True):
                self._texts[row] = position, token
            wanted = call.visible[len(call.visible) - call.wanted :]
            answers.append(self._children([self._text(visible) for visible in wanted], first))
            first += call.wanted
        time.sleep(self._pair.call_ms(sum(call.wanted for call in calls)) / 1e3)
        self.native_s += time.perf_counter() - start
        return answers

    def clear(self, rows: Sequence[int]) -> None:
        """See `DraftGraph`."""

    def _text(self, visible: bytes) -> list[int]:
        rows = sorted(self._texts[row] for row, sees in enumerate(visible) if sees)
        return [token for _, token in rows]

    def _children(self, paths: Sequence[list[int]], first: int) -> Children:
        rows = [self._pair.children(path) for path in paths]
        return Children(
            np.array([[token for token, _ in row] for row in rows], np.int32),
            np.array([[math.log(chance) for _, chance in row] for row in rows], np.float32),
            first,
        )


@dataclasses.dataclass
class PlantedPair:
    """See `dovetail.calibration.measure.pair.Pair`. `skill` scales how often the draft is right; `ends` end a text."""

    pass_ms: Callable[[int], float]
    call_ms: Callable[[int], float]
    skill: float = 1.0
    width: int = 4
    context_length: int = 400
    looks_up: bool = False
    switch_ms: float = 0.0
    branches_cost: bool = False
    ends: frozenset[int] = frozenset()

    def children(self, path: Sequence[int]) -> list[tuple[int, float]]:
        """(token, its probability by the draft), best first."""
        rng = np.random.default_rng([5, *path[-3:]])
        chance = CONFIDENT if rng.random() < 0.6 else UNSURE
        others = rng.permutation(VOCAB).tolist()
        best = int(row_after(path, VOCAB).argmax())
        others.remove(best)
        tokens = [best, *others] if rng.random() < self.skill * chance else [*others[:3], best]
        rest = [(1 - chance) * 0.6**rank * 0.4 for rank in range(self.width)]
        return list(zip(tokens, [chance, *rest], strict=False))[: self.width]

    def rounds(self, prompt: Sequence[int], texts: int, room: int) -> EngineRounds:
        graph = PlantedGraph(self)
        return EngineRounds(SlowTarget(self.pass_ms, self.switch_ms), graph, prompt, texts, room)

    def texts(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float) -> Iterator[Text]:
        for seed, prompt in enumerate(prompts):
            text = list(prompt)
            sampler, fresh = (
                Sampler(GenerationConfig(temperature=temperature, seed=seed), prompt, VOCAB) for _ in range(2)
            )
            has_ended = False
            while len(text) < len(prompt) + new_tokens and not has_ended:
                text.append(sampler.draw(row_after(text, VOCAB)))
                has_ended = text[-1] in self.ends
            features = np.zeros((len(text) - 1, D), np.float32)
            yield Text(np.array(text, np.int64), features, len(prompt), has_ended, fresh)

    def reader(self) -> DraftReader:
        graph = PlantedGraph(self)
        return DraftReader(ModelDraft(graph), JointCalls(graph))

    def decode(
        self, prompt: Sequence[int], policy: Policy, costs: Costs, new_tokens: int, sampler: Sampler | None = None
    ) -> list[Update]:
        """Real rounds of one text, the one in which the prompt is read first."""
        greedy = sampler is None
        sampler = sampler or Sampler(GenerationConfig(), list(prompt), VOCAB)
        target, graph, updates = SlowTarget(self.pass_ms, self.switch_ms), PlantedGraph(self), Updates()
        engine = Engine(target, RoundPlanner(costs), graph, 1)
        cache = TextCache(target.sequence(), ModelDraft(graph), LookupDraft() if self.looks_up else None)
        sequence = TextSequence(
            prompt,
            cache,
            sampler=sampler,
            pace=Pace(policy),
            max_new_tokens=new_tokens,
            ends=self.ends,
            foresight=blind if greedy else sampler.foresee,
        )
        engine.add(sequence, updates.take, cache.close)
        while not engine.is_idle:
            engine.step()
        return updates.taken

    def generate(self, prompt: Sequence[int], policy: Policy, temperature: float, seed: int, new_tokens: int) -> Run:
        sampler = Sampler(GenerationConfig(temperature=temperature, seed=seed), list(prompt), VOCAB)
        updates = self.decode(prompt, policy, ASSUMED, new_tokens, sampler)
        ms = sum(update.cost.total_ms for update in updates if update.cost is not None and update.nodes)
        rounds = [update for update in updates if update.nodes]
        return Run(sum(len(update.tokens) for update in rounds), ms, len(rounds))


class Updates:
    """What the steps brought one text."""

    def __init__(self) -> None:
        self.taken: list[Update] = []

    def take(self, update: Update) -> None:
        self.taken.append(update)


def tokens(count: int) -> list[int]:
    """A text to take prompts from."""
    return np.random.default_rng(3).integers(0, VOCAB, count).tolist()


@contextlib.contextmanager
def opening(pair: PlantedPair) -> Iterator[PlantedPair]:
    """As a pipeline is opened."""
    yield pair
