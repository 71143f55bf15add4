"""The loop: propose, verify, accept, commit, emit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from dovetail.runtime.drafts.base import Draft, Foresight, blind
from dovetail.runtime.policies.base import ChainGrowth, Growth, Policy
from dovetail.runtime.trees.acceptance import Draw, accept
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree


class Verification(Protocol):
    """The target's answer to a tree of N nodes."""

    @property
    def logits(self) -> Float32s: ...  # [N, V]
    @property
    def features(self) -> Float32s: ...  # [N, D]


class Target(Protocol):
    """One text in the model whose words count."""

    @property
    def native_s(self) -> float: ...  # seconds spent inside the target's engine so far
    @property
    def length(self) -> int: ...  # tokens in the cache
    @property
    def window(self) -> int | None: ...  # tokens that the most short-sighted layer sees; None: all see everything

    def prefill(self, tokens: Int64s) -> Verification: ...  # logits of the last alone, features of all
    def verify(self, tree: Tree) -> Verification: ...
    def commit(self, path: Sequence[int]) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """What one round did and what it cost, in milliseconds. `host_ms` is all that is neither the target's engine nor
    the draft's.
    """

    tokens: list[int]  # accepted drafted tokens, then the bonus token
    nodes: int  # 0: no tree was verified, the token came with the prompt
    draft_ms: float
    verify_ms: float
    host_ms: float

    @property
    def accept_length(self) -> int:
        """Accepted drafted tokens, the bonus token not counted."""
        return len(self.tokens) - 1


def rounds(
    target: Target,
    draft: Draft,
    policy: Policy,
    draw: Draw,
    prompt: Int64s,
    max_new_tokens: int,
    ends: frozenset[int] = frozenset(),
    foresight: Foresight = blind,
) -> Iterator[Round]:
    """Continue `prompt` [n >= 1] by up to `max_new_tokens` >= 1 tokens, or to one of `ends`: the first token comes with
    the prompt, the others a round at a time. `foresight`: what the draft may know of `draw`.
    """
    clock = Stopwatch(target, draft)
    out = target.prefill(prompt)
    tokens, features = np.append(prompt, draw(out.logits[0])), out.features
    emitted = 1
    yield clock.lap(0, [int(tokens[-1])])
    policy.begin()
    while emitted < max_new_tokens and tokens[-1] not in ends:
        clock.start()
        room = max_new_tokens - emitted
        tree = propose(draft, target, tokens, features, policy.growth(room, target.length), foresight)
        out = target.verify(tree)
        accepted = accept(tree, out.logits, draw, room, ends)
        target.commit(accepted.path)
        policy.observe(len(accepted.path) - 1)
        tokens, features = np.array(accepted.tokens), out.features[accepted.path]
        emitted += len(tokens)
        yield clock.lap(len(tree), accepted.tokens)


def propose(
    draft: Draft, target: Target, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight
) -> Tree:
    """The draft's tree; without siblings wherever it reaches beyond the target's attention window.

    The target counts its window in cache slots. In a chain slots are positions; a sibling's slot between a node and
    its ancestors would push the oldest token that the node still sees out of the window.
    """
    if target.window is None:
        return draft.propose(tokens, features, growth, foresight)
    left = target.window - target.length
    growth = growth if left > 2 else ChainGrowth(growth)  # siblings need three nodes
    tree = draft.propose(tokens, features, growth, foresight)
    return tree if len(tree) <= left else tree.first_chain()


class Stopwatch:
    """Splits each round's time into draft, target and host. What a consumer does between two rounds is not counted."""

    def __init__(self, target: Target, draft: Draft) -> None:
        self._target, self._draft = target, draft
        self._started = self._now()

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), self._target.native_s, self._draft.native_s

    def start(self) -> None:
        """A round begins."""
        self._started = self._now()

    def lap(self, nodes: int, tokens: list[int]) -> Round:
        """The round that began last, with its times."""
        wall, verify, draft = (1e3 * (now - then) for now, then in zip(self._now(), self._started, strict=True))
        return Round(tokens, nodes, draft, verify, wall - verify - draft)
