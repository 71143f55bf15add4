"""A text whose drafts are asked for trees, round by round, without a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from fakes.drafts import FakeDraft, FakeGraph

from dovetail.runtime.decoding.drafting import DraftedTree, draft_trees
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.drafts.base import Draft, Foresight, blind
from dovetail.runtime.drafts.joint_calls import JointCalls
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.trees.verified import Verified


class Text:
    """See `DecodingText`. Its drafts were told of all of it."""

    def __init__(
        self,
        policy: Policy,
        text: Sequence[int],
        model: FakeDraft | None = None,
        *,
        looks_up: bool = False,
        pace: Pace | None = None,
        room: int = 100,
    ) -> None:
        self.pace = pace or Pace(policy)
        self.reach = room - 1
        self.model = model
        self.lookup: Draft | None = LookupDraft() if looks_up else None
        self.foresight: Foresight = blind
        self.only_chains = False
        self.text: list[int] = []
        self.go_on(text)

    @property
    def root(self) -> int:
        return self.text[-1]

    def go_on(self, tokens: Sequence[int]) -> None:
        """The target verified these."""
        begin = max(len(self.text) - 1, 0)
        self.text += tokens
        told = np.array(self.text[begin:])
        for draft in (self.model, self.lookup):
            if draft is not None:
                draft.tell(Verified(begin, told, np.empty((len(told) - 1, 0), np.float32)))


def _free_branches(costs: Costs) -> RoundPlanner:
    return RoundPlanner(dataclasses.replace(costs, branches_cost=False))


def round_of(
    texts: Sequence[Text], costs: Costs, context: int = 100, *, planner: RoundPlanner | None = None
) -> list[DraftedTree]:
    """The trees of one pass: of a first one, if it is not a `planner`'s next. Every node is one row."""
    planner = planner or _free_branches(costs)
    load = planner.load([text.pace for text in texts], [context] * len(texts), 0)
    graph: object = FakeGraph()
    return draft_trees(planner, load, texts, JointCalls(graph))[0]  # type: ignore[arg-type]  # enough of a graph


def rounds(text: Text, costs: Costs, count: int, accept: Callable[[DraftedTree], int]) -> list[DraftedTree]:
    """So many rounds behind an end that stays; `accept` says how many tokens of a tree the target takes."""
    made, planner = [], _free_branches(costs)
    for _ in range(count):
        (tree,) = round_of([text], costs, planner=planner)
        text.pace.observe(tree.verdict(accept(tree)))
        made.append(tree)
    return made
