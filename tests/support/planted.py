"""A target and a draft made of sleeps and dice: what they cost and how often they agree is known exactly.

The sleeps are of a clock that only they move (`use_own_clock`), so that a busy machine does not bend them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import fakes
import numpy as np
import pytest
from dovetail.runtime.decoding.rounds import Round, rounds
from dovetail.runtime.drafts.lookup_or_model import MixedDraft

from dovetail.calibration.measure.pair import Run, Text
from dovetail.runtime.drafts.base import Draft, Foresight, blind
from dovetail.runtime.drafts.graph_contract import Children
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.policies.base import Growth, Policy
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, TreeBuilder, root_only

VOCAB = 12
ROOM = 64  # tokens of `PlantedPair.continue_from`
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


class SlowTarget(fakes.FakeTarget):
    """`pass_ms(nodes)` for every pass."""

    def __init__(self, pass_ms: Callable[[int], float]) -> None:
        super().__init__(VOCAB)
        self._pass_ms = pass_ms
        self.native_s = 0.0

    def verify(self, tree: Tree) -> fakes.Output:
        start = time.perf_counter()
        time.sleep(self._pass_ms(len(tree)) / 1e3)
        self.native_s += time.perf_counter() - start
        return super().verify(tree)


class PlantedDraft:
    """Grows real trees; the children of a node depend on its last tokens alone."""

    bytes_in = bytes_out = 0

    def __init__(self, pair: PlantedPair, call_ms: Callable[[int], float]) -> None:
        self._pair, self._call_ms = pair, call_ms
        self.text: list[int] = []

    @property
    def native_s(self) -> float:
        return self._pair.draft_s

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        self.text += tokens.tolist()
        builder = TreeBuilder(self.text[-1])
        if not growth.goes_on(0, [0.0]):
            return root_only(self.text[-1])
        width = min(growth.width, self._pair.width)
        paths = {0: self.text}
        expanded, depth = [0], 0
        while depth == 0 or growth.goes_on(depth, builder.newest_scores):
            if depth:
                expanded = builder.frontier(width)
            start = time.perf_counter()
            made = [self._pair.children(paths[node]) for node in expanded]
            offered = Children(
                np.array([[token for token, _ in row] for row in made], np.int32),
                np.array([[math.log(chance) for _, chance in row] for row in made], np.float32),
            )
            children, log_probs = offered.best(width, depth + 1, foresight)
            time.sleep(self._call_ms(len(expanded)) / 1e3)
            self._pair.draft_s += time.perf_counter() - start
            builder.extend(expanded, children, log_probs)
            for row, node in enumerate(expanded):
                for column in range(width):
                    paths[builder.newest + row * width + column] = [*paths[node], children[row][column]]
            depth += 1
        return builder.best(growth.drafted)


@dataclasses.dataclass
class PlantedPair:
    """See `dovetail.calibration.measure.pair.Pair`. `skill` scales how often the draft is right."""

    pass_ms: Callable[[int], float]
    call_ms: Callable[[int], float]
    skill: float = 1.0
    width: int = 4
    context_length: int = 400
    looks_up: bool = False
    draft_s: float = 0.0

    def children(self, path: Sequence[int]) -> list[tuple[int, float]]:
        """(token, its probability by the draft), best first."""
        rng = np.random.default_rng([5, *path[-3:]])
        chance = CONFIDENT if rng.random() < 0.6 else UNSURE
        others = rng.permutation(VOCAB).tolist()
        best = int(fakes.row(path, VOCAB).argmax())
        others.remove(best)
        tokens = [best, *others] if rng.random() < self.skill * chance else [*others[:3], best]
        rest = [(1 - chance) * 0.6**rank * 0.4 for rank in range(self.width)]
        return list(zip(tokens, [chance, *rest], strict=False))[: self.width]

    def continue_from(self, prompt: Sequence[int], policy: Policy) -> Iterator[Round]:
        target = SlowTarget(self.pass_ms)
        return rounds(target, self._draft(), policy, _greedy, np.array(prompt, np.int64), ROOM)

    def close(self) -> None:
        pass

    def texts(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float) -> Iterator[Text]:
        for seed, prompt in enumerate(prompts):
            text = list(prompt)
            sampler, fresh = (
                Sampler(GenerationConfig(temperature=temperature, seed=seed), prompt, VOCAB) for _ in range(2)
            )
            for _ in range(new_tokens):
                text.append(sampler.draw(fakes.row(text, VOCAB)))
            yield Text(np.array(text, np.int64), np.zeros((len(text) - 1, fakes.D), np.float32), len(prompt), fresh)

    def reader(self) -> PlantedDraft:
        return PlantedDraft(self, self.call_ms)

    def _draft(self) -> Draft:
        return MixedDraft(self.reader(), LookupDraft()) if self.looks_up else self.reader()

    def generate(self, prompt: Sequence[int], policy: Policy, temperature: float, seed: int, new_tokens: int) -> Run:
        sampler = Sampler(GenerationConfig(temperature=temperature, seed=seed), list(prompt), VOCAB)
        target = SlowTarget(self.pass_ms)
        text, foresight = np.array(prompt, np.int64), sampler.foresee
        made = list(rounds(target, self._draft(), policy, sampler.draw, text, new_tokens, foresight=foresight))
        ms = sum(done.draft_ms + done.verify_ms + done.host_ms for done in made)
        return Run(sum(len(done.tokens) for done in made), ms, len(made))


def _greedy(logits: Float32s) -> int:
    return int(logits.argmax())


def tokens(count: int) -> list[int]:
    """A text to take prompts from."""
    return np.random.default_rng(3).integers(0, VOCAB, count).tolist()


@contextlib.contextmanager
def opening(pair: PlantedPair) -> Iterator[PlantedPair]:
    """As a pipeline is opened."""
    yield pair
