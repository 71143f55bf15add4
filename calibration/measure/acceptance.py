"""What the target accepts of a draft: at every position of the target's own texts, all that the draft, and matches in
the text, would offer there beside what the target went on to say.

A candidate counts as accepted when the text continues with its path. The text was drawn from the target, so that is
exactly the event that decides in a real round, greedy or sampled. With every position recorded, any policy can be
replayed on the texts afterwards (`dovetail.calibration.choose.search`).

A draft does not know where a text ends, and offers what would follow. As in a real round an end token is drawn, never
accepted, and so is nothing behind it.

Letters: N candidates with the root, d depth, r rank among siblings, both from 0 in arrays.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dovetail.calibration.measure.pair import Pair, Text
from dovetail.calibration.measure.price_tables import rising
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.errors import UserError
from dovetail.runtime.policies.base import LOOKUP_TREE, DepthBudget
from dovetail.runtime.policies.chances import SCORE_BINS, SCORE_STEP, Chances
from dovetail.runtime.trees.tree import CandidateTree, Tree
from dovetail.runtime.trees.verified import Verified

MAX_DEPTH = 10  # levels that are recorded
MAX_WIDTH = 10
_HOPELESS = -5.0  # no level is drafted behind one whose best path has less than e^-5 by the draft's own estimate
_FEWEST = 50  # positions
_PRIOR = 4.0  # as many observations stand for what is believed before any


@dataclasses.dataclass(frozen=True, slots=True)
class Matched:
    """What the text's own repetitions offer at a position."""

    scores: list[float]  # descending
    depths: list[int]
    parents: list[int]  # which of them each goes on from; -1: the root
    path: list[int]  # which of them the text followed, from depth 1 on


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One position: the candidates of the widest and deepest tree, and which of them the text followed."""

    parents: list[int]  # [N] node 0 is the root; siblings in the order of their rank
    scores: list[float]  # [N] cumulative log-probabilities
    depths: list[int]  # [N]
    path: list[int]  # accepted candidates, from depth 1 on
    children: dict[int, list[int]]  # of every candidate that was expanded
    context: int  # tokens in the target's cache
    is_end: bool  # whether the text ends with the token that comes next
    matches: Matched


TextRecords = list[Record]
"""The positions of one text, one after another."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Widest:
    """Grows the largest tree worth looking at."""

    width: int = MAX_WIDTH
    depth: int = MAX_DEPTH

    def wants_level(self, levels: Sequence[Sequence[float]]) -> bool:
        return not levels or (len(levels) < self.depth and max(levels[-1], default=-math.inf) > _HOPELESS)


def record(pair: Pair, text: Text) -> TextRecords:
    """Every position behind the prompt, to the end of the text; of one that was cut off, those that have `MAX_DEPTH`
    tokens to follow.
    """
    draft, lookup, records = pair.reader(), LookupDraft(), []
    tokens, features, begin = text.tokens, text.features, 0
    budget, match_budget = _Widest(), DepthBudget(LOOKUP_TREE.depth, LOOKUP_TREE.width)
    acceptable = len(tokens) - 1 if text.has_ended else len(tokens)
    last = acceptable if text.has_ended else acceptable - MAX_DEPTH
    for position in range(text.prompt_length, last + 1):
        verified = Verified(begin, tokens[begin:position], features[begin : position - 1])
        following = tokens[position:acceptable].tolist()
        root = int(tokens[position - 1])
        matches = CandidateTree(root)
        if pair.looks_up:
            lookup.tell(verified)
            matches = lookup.grow(root, match_budget).candidates
        candidates = draft.grow(verified, budget, text.sampler.foresee)
        matched = _matched(matches, following)
        is_end = text.has_ended and position == last
        records.append(_record(candidates, following[:MAX_DEPTH], position - 1, is_end, matched))
        text.sampler.follow(int(tokens[position]))
        begin = position - 1
    draft.close()
    return records


def _record(
    candidates: CandidateTree, following: Sequence[int], context: int, is_end: bool, matched: Matched
) -> Record:
    tree = candidates.best(len(candidates))  # all of them, so a node has the number of its candidate
    parents, depths = tree.parents.tolist(), tree.depths().tolist()
    children = dict[int, list[int]]()
    for node in range(1, len(parents)):
        children.setdefault(parents[node], []).append(node)
    scores = [0.0, *(score for level in candidates.levels for score in level)]
    return Record(parents, scores, depths, _path(tree, following), children, context, is_end, matched)


def _matched(candidates: CandidateTree, following: Sequence[int]) -> Matched:
    tree = candidates.best(len(candidates))
    order, depths = candidates.ranked, tree.depths().tolist()
    rank = {node: i for i, node in enumerate(order)} | {0: -1}
    return Matched(
        scores=candidates.scores,
        depths=[depths[node] for node in order],
        parents=[rank[candidates.parent_of(node)] for node in order],
        path=[rank[node] for node in _path(tree, following)],
    )


def _path(tree: Tree, following: Sequence[int]) -> list[int]:
    """The nodes behind the root that the text goes on with."""
    path, node, families = list[int](), 0, tree.families()
    for token in following:
        if token not in families[node]:
            break
        node = families[node][token]
        path.append(node)
    return path


def collect(
    pair: Pair,
    texts: Iterable[Text],
    *,
    positions: int,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
) -> list[TextRecords]:
    """Records of text after text, until there are `positions` and `seconds` are over, or no text is left. Raises
    `UserError` where they are too few to say anything.
    """
    made: list[TextRecords] = []
    start, count = time.perf_counter(), 0
    for text in texts:
        spent = time.perf_counter() - start
        if count >= positions and spent >= seconds:
            break
        made.append(record(pair, text))
        count += len(made[-1])
        progress(min(1.0, count / positions))
    if count < _FEWEST:
        raise UserError(
            f"expected texts of at least {_FEWEST} tokens in all to estimate acceptance, got {count} behind "
            f"{len(made)} prompts, because they end at once; give more or other questions (`prompts`)"
        )
    return made


def by_rank(texts: Sequence[TextRecords]) -> tuple[tuple[float, ...], ...]:
    """[d][r]: the share of positions at which the child of rank r at depth d was accepted, of those where its parent
    was. Where observations are few, the depth above stands in.
    """
    offered, hits = Counter[int](), Counter[tuple[int, int]]()
    for found in (found for text in texts for found in text):
        parent = 0
        for depth in range(MAX_DEPTH):
            siblings = found.children.get(parent)
            if siblings is None:
                break
            offered[depth] += 1
            if depth == len(found.path):
                break
            parent = found.path[depth]
            hits[depth, siblings.index(parent)] += 1
    ranks = max((len(siblings) for text in texts for found in text for siblings in found.children.values()), default=1)
    rows: list[tuple[float, ...]] = []
    for depth in range(MAX_DEPTH):
        if depth and not offered[depth]:
            break
        above = rows[-1] if rows else (0.0,) * ranks
        weight = _PRIOR if depth else 0.0
        total = max(offered[depth] + weight, 1.0)
        rows.append(tuple((hits[depth, rank] + weight * above[rank]) / total for rank in range(ranks)))
    return tuple(rows)


def by_score(texts: Sequence[TextRecords], depth: int | None = None) -> tuple[float, ...]:
    """The chance that a candidate's whole path is accepted, by bins of its score, never rising as the score falls; at
    one depth (from 1), or at all. The draft's own estimate stands in where observations are few.
    """
    counts, hits = np.zeros(SCORE_BINS), np.zeros(SCORE_BINS)
    for found in (found for text in texts for found in text):
        scores, depths = np.array(found.scores[1:]), np.array(found.depths[1:])
        bins = np.minimum((scores / -SCORE_STEP).astype(np.int64), SCORE_BINS - 1)
        chosen = slice(None) if depth is None else depths == depth
        np.add.at(counts, bins[chosen], 1)
        path = [node - 1 for node in found.path if depth is None or found.depths[node] == depth]
        np.add.at(hits, bins[path], 1)
    estimate = np.array([math.exp(-SCORE_STEP * (i + 0.5)) for i in range(SCORE_BINS)])
    shares = (hits + _PRIOR * estimate) / (counts + _PRIOR)
    fitted = rising(shares[::-1].tolist(), (counts + _PRIOR)[::-1].tolist())
    return tuple(min(1.0, share) for share in reversed(fitted))


def chances(texts: Sequence[TextRecords]) -> Chances:
    """What the policies need to know."""
    return Chances(by_score(texts), by_rank(texts))
