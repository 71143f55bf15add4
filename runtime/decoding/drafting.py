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
from dovetail.runtime.trees.tree import CandidateTree, Tree


class DecodingText(Protocol):
    """A text whose next tree is wanted. Its drafts know the whole text."""

    @property
    def root(self) -> int: ...  # its last token
    @property
    def reach(self) -> int: ...  # how deep its tree may be; 0: no tree
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
    """A text's candidates, and which of them are verified."""

    candidates: CandidateTree
    kept: list[int]
    source: str  # model, matches, or none: the root alone
    hoped: float  # accepted tokens, by the chances alone
    extra_ms: float  # what it costs beyond a round without it, by the prices
    plain_rate: float  # tokens per millisecond of plain decoding of the pass's texts

    @property
    def count(self) -> int:
        """How many are verified."""
        return len(self.kept)

    @property
    def tree(self) -> Tree:
        """The root, and what is verified behind it."""
        return self.candidates.tree_of(self.kept)

    def verdict(self, accepted: int) -> Verdict:
        """So many of its tokens were accepted."""
        return Verdict(self.source, accepted, self.hoped, self.extra_ms, self.plain_rate)


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    """Candidates of one source, their chances without and with what this text has taught."""

    source: str
    candidates: CandidateTree
    order: list[int]  # candidates, in the order in which they may be taken
    chances: list[float]  # of those
    rows: list[int]  # that each adds to the pass
    trust: float = 1.0
    draft_ms: float = 0.0
    is_fixed: bool = False

    @property
    def offer(self) -> Offer:
        return Offer([self.trust * chance for chance in self.chances], self.rows, self.is_fixed)


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
    filling = planner.choose(load, [draft.offer for draft in drafts])
    nodes = sum(filling.counts)
    nodes_ms = filling.ms - load.plain_ms
    trees = []
    for draft, count in zip(drafts, filling.counts, strict=True):
        share = count / nodes if nodes else 1 / len(drafts)
        trees.append(
            DraftedTree(
                candidates=draft.candidates,
                kept=draft.order[:count],
                source=draft.source,
                hoped=sum(draft.chances[:count]),
                extra_ms=draft.draft_ms + nodes_ms * share,
                plain_rate=load.plain_rate,
            )
        )
    return trees, times


def _draft(
    load: PassLoad,
    source: str,
    candidates: CandidateTree,
    chances: list[float],
    *,
    trust: float,
    draft_ms: float = 0.0,
    is_fixed: bool = False,
) -> _Draft:
    """The best candidates, whose `chances` these are. Where a sibling is fed with its whole path, those that are not
    worth so many rows are left out, and what hangs on them; but of a fixed tree none.
    """
    order = candidates.ranked[: len(chances)]
    if not load.prices.branches_cost:
        return _Draft(source, candidates, order, chances, [1] * len(order), trust, draft_ms, is_fixed)
    if not is_fixed:
        worth = trust / max(load.rate * load.prices.row_ms(load.rows), 1e-9)  # rows that a token is worth
        order, chances = _worth_their_rows(candidates, order, chances, worth)
    return _Draft(source, candidates, order, chances, candidates.rows_of(order), trust, draft_ms, is_fixed)


def _worth_their_rows(
    candidates: CandidateTree, order: list[int], chances: list[float], worth: float
) -> tuple[list[int], list[float]]:
    kept, inner = {0: 0}, set[int]()  # candidates with their depths; those that a path goes on from
    taken = []
    for candidate, chance in zip(order, chances, strict=True):
        parent = candidates.parent_of(candidate)
        if parent not in kept:
            continue
        depth = kept[parent] + 1
        if parent in inner and chance * worth < depth + 1:
            continue
        kept[candidate] = depth
        inner.add(parent)
        taken.append(chance)
    return [candidate for candidate in kept if candidate], taken


def _may_ask_model(text: DecodingText) -> bool:
    return (
        text.model is not None
        and text.reach > 0
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
        width=1 if load.prices.branches_cost else policy.tree.width,
        depth=min(policy.tree.depth, text.reach),
        passes=load.passes(policy.tree.nodes - 1),
        draft_ms=lambda levels: load.draft_ms(levels, policy.tree.width, load.texts),
        rate=load.rate,
        trust=text.pace.trust,
    )
    return gain > 0


def _matches(load: PassLoad, text: DecodingText) -> _Draft | None:
    """Matches in the text, if they promise more than the model's round."""
    if text.lookup is None or text.reach < 1 or text.pace.policy.kind == "plain":
        return None
    depth = DepthBudget(min(text.reach, LOOKUP_TREE.depth), LOOKUP_TREE.width)
    budget: TreeBudget = ChainBudget(depth) if text.only_chains else depth
    candidates = text.lookup.grow(text.root, budget).candidates
    if not len(candidates):
        return None
    chances = [math.exp(score) for score in candidates.scores[: LOOKUP_TREE.nodes - 1]]
    count, gain = best_count(chances, load.passes(len(chances)), load.rate, text.pace.match_trust)
    if not count or (_may_ask_model(text) and gain <= text.pace.model_gain(load.gain)):
        return None
    return _draft(load, "matches", candidates, chances, trust=text.pace.match_trust)


def _model_budget(load: PassLoad, text: DecodingText, asking: int) -> TreeBudget:
    policy = text.pace.policy
    depth, width = min(policy.tree.depth, text.reach), policy.tree.width
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
        return _Draft("none", candidates or CandidateTree(text.root), [], [], [])
    policy = text.pace.policy
    scores = candidates.scores[: policy.tree.nodes - 1]
    chances = policy.chances_of(scores)
    # Alone it is what calibration found best; in company it must earn its place, unless somebody asked for it.
    is_fixed = policy.kind == "fixed" and (policy.is_wish or load.texts == 1)
    if is_fixed:  # the whole tree, whatever it hopes for
        chances += [0.0] * (len(scores) - len(chances))
    return _draft(
        load,
        "model",
        candidates,
        chances,
        trust=text.pace.trust,
        draft_ms=load.draft_ms(candidates.depth, policy.tree.width, asking),
        is_fixed=is_fixed,
    )
