"""One text in an engine of its own, over any target and any draft."""

from __future__ import annotations

from collections.abc import Sequence

from fakes.costs import FREE

from dovetail.runtime.decoding.engine import Engine, Update
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.decoding.text_cache import TextCache
from dovetail.runtime.drafts.base import Draft, Foresight, blind
from dovetail.runtime.drafts.graph_contract import DraftGraph
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import TargetEngine
from dovetail.runtime.trees.shape import TreeShape


class Updates:
    """What the steps brought a text."""

    def __init__(self) -> None:
        self.taken: list[Update] = []

    def take(self, update: Update) -> None:
        self.taken.append(update)

    @property
    def tokens(self) -> list[int]:
        return [token for update in self.taken for token in update.tokens]

    @property
    def accept_lengths(self) -> list[int]:
        """Of all rounds behind the token that comes with the prompt."""
        return [update.accept_length for update in self.taken if update.nodes]


def decode(
    target: TargetEngine,
    draft: Draft | None,
    shape: TreeShape,
    sampler: Sampler,
    prompt: Sequence[int],
    count: int,
    *,
    ends: frozenset[int] = frozenset(),
    foresight: Foresight = blind,
    graph: DraftGraph | None = None,
) -> Updates:
    """Up to `count` tokens behind `prompt`, with a tree of `shape` every round; a draft that fails is an error."""
    engine = Engine(target, RoundPlanner(FREE), graph, 1)
    cache, updates = TextCache(target.sequence(), draft, None), Updates()
    policy = Policy("plain") if draft is None or shape.nodes == 1 else Policy("fixed", shape, is_wish=True)
    sequence = TextSequence(
        prompt,
        cache,
        sampler=sampler,
        pace=Pace(policy),
        max_new_tokens=count,
        ends=ends,
        foresight=foresight,
        window=target.window,
        rope_border=target.info.rope_border,
    )
    engine.add(sequence, updates.take, cache.close)
    while not engine.is_idle:
        engine.step()
    if sequence.error is not None:
        raise sequence.error
    assert cache.model is None or cache.model.failure is None, cache.model.failure
    return updates
