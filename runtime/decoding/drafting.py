"""The trees of one round: matches in the text where they promise more, else the model's, and of all texts' candidates
those that are worth their place in the pass.

Matches cost nothing and reach further than a model looks ahead; elsewhere the model is asked (as in SAM Decoding, Hu et
al. 2024, arXiv 2411.10666). What the model missed meanwhile waits until it is asked again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

from dovetail.runtime.decoding.round_planner import Offer, PassLoad, RoundPlanner
from dovetail.runtime.drafts.base import Draft, Foresight
from dovetail.runtime.drafts.joint_calls import CallTime, JointCalls
from dovetail.runtime.policies.adaptive import AdaptiveBudget, promised_gain
from dovetail.runtime.policies.base import LOOKUP_TREE, OWN_ESTIMATES, ChainBudget, DepthBudget, TreeBudget
from dovetail.runtime.policies.chances import best_count
from dovetail.runtime.policies.pace import Pace, Verdict
from dovetail.runtime.trees.tree import CandidateTree


class DecodingText(Protocol):
    """A text whose next tree is wanted. Its drafts know the whole text."""

    @property
    def root(self) -> int: ...  # its last token
    @property
    def room(self) -> int: ...  # tokens that may still come, at least 1
    @property
    def pace(self) -> Pace: ...
    @property
    def model(self) -> Draft | None: ...
    @property
    def lookup(self) -> Draft | None: ...
    @property
    def foresight(self) -> Foresight: ...
    @property
    def only_chains(self) -> bool: ...  # whether its tree may have no siblings


@dataclasses.dataclass(frozen=True, slots=True)
class DraftedTree:
    """A text's candidates, and how many of them are verified."""

    candidates: CandidateTree
    count: int
    source: str  # model, matches, or none: the root alone
    hoped: float  # accepted tokens, by the chances alone
    extra_ms: float  # what it costs beyond a round without it, by the prices
    plain_rate: float  # tokens per millisecond of plain decoding of the pass's texts

    def verdict(self, accepted: int) -> Verdict:
        """So many of its tokens were accepted."""
        return Verdict(self.source, accepted, self.hoped, self.extra_ms, self.plain_rate)


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    """Candidates of one source, their chances without and with what this text has taught."""

    source: str
    candidates: CandidateTree
    chances: list[float]
    trust: float = 1.0
    draft_ms: float = 0.0
    is_fixed: bool = False

    @property
    def offer(self) -> Offer:
        return Offer([self.trust * chance for chance in self.chances], self.is_fixed)


def draft_trees(
    planner: RoundPlanner, load: PassLoad, texts: Sequence[DecodingText], calls: JointCalls | None
) -> tuple[list[DraftedTree], list[CallTime]]:
    """A tree for every text of the pass, and the times of the draft's calls. `calls` runs the models' graph."""
    matches = [_matches(load, text) for text in texts]
    asking = [
        text
        for text, found in zip(texts, matches, strict=True)
        if found is None and _may_ask_model(text) and _model_pays(load, text)
    ]
    growths = []
    for text in asking:
        assert text.model is not None
        growths.append(text.model.grow(text.root, _model_budget(load, text, len(asking)), text.foresight))
    times: list[CallTime] = []
    if growths:
        widest = max(text.pace.policy.tree.width for text in asking)
        if calls is None:
            assert all(growth.next_call() is None for growth in growths), "a draft without its graph"
        else:
            times = calls.grow(growths, widest)
    grown = {id(text): growth.candidates for text, growth in zip(asking, growths, strict=True)}
    drafts = [
        found or _of_model(load, text, grown.get(id(text)), len(asking))
        for text, found in zip(texts, matches, strict=True)
    ]
    counts = planner.choose(load, [draft.offer for draft in drafts])
    nodes = sum(counts)
    passes = load.passes(nodes)
    nodes_ms = passes[nodes] - passes[0]
    return [
        DraftedTree(
            candidates=draft.candidates,
            count=count,
            source=draft.source,
            hoped=sum(draft.chances[:count]),
            extra_ms=draft.draft_ms + (nodes_ms * count / nodes if count else 0.0),
            plain_rate=load.plain_rate,
        )
        for draft, count in zip(drafts, counts, strict=True)
    ], times


def _may_ask_model(text: DecodingText) -> bool:
    return (
        text.model is not None
        and text.room > 1
        and text.pace.policy.kind in ("fixed", "adaptive")
        and not text.pace.is_resting
    )


def _model_pays(load: PassLoad, text: DecodingText) -> bool:
    """Whether a tree is expected to earn its calls. Alone a text finds that out by itself, and rests; in company the
    rows of the others leave a draft less to gain, and a round without it is known to cost nothing.
    """
    policy = text.pace.policy
    if load.texts == 1 or policy.is_wish:
        return True
    gain = promised_gain(
        policy.chances or OWN_ESTIMATES,
        width=policy.tree.width,
        depth=min(policy.tree.depth, text.room - 1),
        passes=load.passes(policy.tree.nodes - 1),
        draft_ms=lambda levels: load.draft_ms(levels, policy.tree.width, load.texts),
        rate=load.rate,
        trust=text.pace.trust,
    )
    return gain > 0


def _matches(load: PassLoad, text: DecodingText) -> _Draft | None:
    """Matches in the text, if they promise more than the model's round."""
    if text.lookup is None or text.room < 2 or text.pace.policy.kind == "plain":
        return None
    depth = DepthBudget(min(text.room - 1, LOOKUP_TREE.depth), LOOKUP_TREE.width)
    budget: TreeBudget = ChainBudget(depth) if text.only_chains else depth
    candidates = text.lookup.grow(text.root, budget).candidates
    if not len(candidates):
        return None
    chances = [math.exp(score) for score in candidates.scores[: LOOKUP_TREE.nodes - 1]]
    count, gain = best_count(chances, load.passes(len(chances)), load.rate, text.pace.match_trust)
    if not count or (_may_ask_model(text) and gain <= text.pace.model_gain(load.gain)):
        return None
    return _Draft("matches", candidates, chances, text.pace.match_trust)


def _model_budget(load: PassLoad, text: DecodingText, asking: int) -> TreeBudget:
    policy = text.pace.policy
    depth, width = min(policy.tree.depth, text.room - 1), policy.tree.width
    budget: TreeBudget = DepthBudget(depth if policy.tree.nodes > 1 else 0, width)
    if policy.kind == "adaptive":
        assert policy.chances is not None
        budget = AdaptiveBudget(
            policy.chances,
            width=width,
            depth=depth,
            passes=load.passes(policy.tree.nodes - 1),
            level_ms=load.prices.level_ms(width * asking) / asking,
            rate=load.rate,
            trust=text.pace.trust,
        )
    return ChainBudget(budget) if text.only_chains else budget


def _of_model(load: PassLoad, text: DecodingText, candidates: CandidateTree | None, asking: int) -> _Draft:
    if candidates is None or not len(candidates):
        return _Draft("none", candidates or CandidateTree(text.root), [])
    policy = text.pace.policy
    scores = candidates.scores[: policy.tree.nodes - 1]
    chances = policy.chances_of(scores)
    # Alone it is what calibration found best; in company it must earn its place, unless somebody asked for it.
    is_fixed = policy.kind == "fixed" and (policy.is_wish or load.texts == 1)
    if is_fixed:  # the whole tree, whatever it hopes for
        chances += [0.0] * (len(scores) - len(chances))
    return _Draft(
        source="model",
        candidates=candidates,
        chances=chances,
        trust=text.pace.trust,
        draft_ms=load.draft_ms(candidates.depth, policy.tree.width, asking),
        is_fixed=is_fixed,
    )
