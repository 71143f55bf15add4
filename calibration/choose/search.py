"""Choosing: the policy that makes most tokens per second out of measured costs and recorded acceptance.

Two kinds of the draft's trees compete with plain decoding and with matches in the text alone. A *fixed* one has the
same number of nodes, depth and width every round; it begins at the optimum for acceptance by rank alone (Sequoia, Chen
et al. 2024, arXiv 2402.12374) and moves to the best on the recorded texts. An *adaptive* one is grown as
`AdaptiveBudget` says. Both stand behind matches, and are replayed on the same records with the same code
that decides at run time.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from dovetail.calibration.measure import acceptance
from dovetail.calibration.measure.acceptance import Matched, Record, TextRecords
from dovetail.calibration.measure.latency import WIDTHS
from dovetail.runtime.decoding.drafting import DraftedTree, draft_trees
from dovetail.runtime.decoding.round_planner import PassLoad, RoundPlanner
from dovetail.runtime.drafts.base import Draft, Foresight, Grown, blind
from dovetail.runtime.pipeline import UNMEASURED_GAIN
from dovetail.runtime.policies.base import LOOKUP_TREE, PLAIN_TREE, Policy, TreeBudget
from dovetail.runtime.policies.chances import Chances
from dovetail.runtime.policies.costs import Costs, Prices
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import CandidateTree
from dovetail.runtime.trees.verified import Verified

_SETTLED = 0.01  # relative change of the rate at which it counts as found
_SETTLING = 3  # replays for it, at most


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """What a policy would have done on recorded texts."""

    rounds: int
    tokens: int
    ms: float
    nodes: int
    levels: int
    accept_lengths: Counter[int]

    @property
    def tokens_per_second(self) -> float:
        """Foretold speed."""
        return 1e3 * self.tokens / self.ms

    @property
    def accept_length(self) -> float:
        """Accepted drafted tokens a round."""
        return self.tokens / self.rounds - 1

    @property
    def round_ms(self) -> float:
        """What a round costs on average."""
        return self.ms / self.rounds


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A policy and its replay."""

    policy: Policy
    replay: Replay

    @property
    def kind(self) -> str:
        """Of the policy."""
        return self.policy.kind

    @property
    def tree(self) -> TreeShape:
        """Of the policy."""
        return self.policy.tree


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """The best of each kind on one set of texts."""

    plain: Candidate
    lookup: Candidate
    fixed: Candidate
    adaptive: Candidate
    default: Candidate  # what runs where nothing was calibrated
    by_rank: RankOptimum
    chances: Chances

    def named(self) -> dict[str, Candidate]:
        """By the names under which they are compared."""
        kinds = (self.plain, self.lookup, self.fixed, self.adaptive)
        return {one.kind: one for one in kinds} | {"default": self.default}


@dataclasses.dataclass(frozen=True, slots=True)
class RankOptimum:
    """The best tree whose nodes are chosen by depth and rank alone."""

    tree: TreeShape
    accept_length: float
    tokens_per_ms: float


def best_by_rank(
    by_rank: Sequence[Sequence[float]],
    round_ms: Callable[[int, int, int], float],
    plain_ms: float,
    max_nodes: int,
    widths: Sequence[int],
) -> RankOptimum:
    """Maximise `(1 + E[accept length]) / round_ms(nodes, depth, width)` over all trees of up to `max_nodes` nodes,
    depths up to `len(by_rank)` and `widths`; a root alone costs `plain_ms`.

    `by_rank[d][r]` is the chance of the child of rank r at depth d given its parent. A node is reached with the product
    along its path, which never exceeds its parent's, and the expected accept length is the sum over all nodes. So for
    a given depth and width the best tree of n nodes is the root and the n - 1 likeliest others: the same optimum that
    Sequoia's dynamic program over (nodes, depth) finds, without its tables.
    """
    best = RankOptimum(PLAIN_TREE, 0.0, 1 / plain_ms)
    for depth, width in itertools.product(range(1, len(by_rank) + 1), widths):
        accepted = 0.0
        for nodes, reach in enumerate(itertools.islice(_likeliest(by_rank[:depth], width), max_nodes - 1), 2):
            accepted += reach
            rate = (1 + accepted) / round_ms(nodes, depth, width)
            if rate > best.tokens_per_ms:
                best = RankOptimum(TreeShape(nodes, depth, width), accepted, rate)
    return best


def _likeliest(by_rank: Sequence[Sequence[float]], width: int) -> Iterator[float]:
    """Chances of reaching the nodes of the complete tree, descending."""
    heap = [(-1.0, 0)]
    while heap:
        reach, depth = heapq.heappop(heap)
        if depth:
            yield -reach
        if depth < len(by_rank):
            for share in by_rank[depth][:width]:
                heapq.heappush(heap, (reach * share, depth + 1))


def replay(texts: Sequence[TextRecords], policy: Policy, costs: Costs) -> Replay:
    """Decode the recorded texts with `policy`, by the code that decodes: its rounds begin where the last one ended, and
    the last one ends with the text. No tree knows where that is, unless the text was cut off there.
    """
    planner = RoundPlanner(costs)
    rounds = tokens = nodes = levels = 0
    ms, lengths = 0.0, Counter[int]()
    for text in texts:
        decoding = RecordedText(Pace(policy))
        position = 0
        while position < len(text):
            record, left = text[position], len(text) - position - 1
            decoding.show(record, reach=LOOKUP_TREE.depth if text[-1].is_end else left)
            load = planner.load([decoding.pace], [record.context], 0)
            (drafted,), _ = draft_trees(planner, load, [decoding], None)
            accepted = min(decoding.accepted(drafted), left)
            decoding.pace.observe(drafted.verdict(accepted))
            ms += load.plain_ms + drafted.extra_ms
            rounds, tokens, nodes = rounds + 1, tokens + accepted + 1, nodes + drafted.count + 1
            levels += drafted.candidates.depth if drafted.source == "model" else 0
            lengths[accepted] += 1
            position += accepted + 1
    return Replay(rounds, tokens, ms, nodes, levels, lengths)


class RecordedText:
    """A text whose drafts offer what was recorded. See `DecodingText`."""

    root = 0
    foresight = staticmethod(blind)
    only_chains = False

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.reach = 0
        self.model: Draft = RecordedDraft()
        self.lookup: Draft = RecordedDraft()

    def show(self, record: Record, reach: int) -> None:
        """The position that is decoded next."""
        self._record, self.reach = record, reach
        self.model = RecordedDraft(record)
        self.lookup = RecordedDraft(matches=record.matches)

    def accepted(self, drafted: DraftedTree) -> int:
        """How far the text goes along the tree."""
        kept = set(drafted.candidates.tokens_of(drafted.kept))
        path = [node + 1 for node in self._record.matches.path] if drafted.source == "matches" else self._record.path
        return next((i for i, node in enumerate(path) if node not in kept), len(path))


class RecordedDraft:
    """Grows a tree out of recorded candidates, whose numbers stand for their tokens. See `Draft`."""

    known = 0

    def __init__(self, record: Record | None = None, matches: Matched | None = None) -> None:
        self._record, self._matches = record, matches

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> Grown:
        """As the draft would have grown it."""
        candidates = CandidateTree(root)
        if self._matches is not None:
            self._grow_matches(candidates, budget)
        elif self._record is not None:
            self._grow_model(candidates, self._record, budget)
        return Grown(candidates)

    def _grow_model(self, candidates: CandidateTree, record: Record, budget: TreeBudget) -> None:
        scores, width, expanded = record.scores, budget.width, [0]
        while budget.wants_level(candidates.levels):
            children = [(i, child) for i in expanded for child in self._children(candidates, record, i)[:width]]
            if not children:
                break
            parents = [i for i, _ in children]
            nodes = [child for _, child in children]
            steps = [scores[node] - scores[record.parents[node]] for node in nodes]
            candidates.add_level(parents, nodes, steps)
            expanded = candidates.frontier(width)

    @staticmethod
    def _children(candidates: CandidateTree, record: Record, candidate: int) -> list[int]:
        node = candidates.tokens_of([candidate])[0] if candidate else 0
        return record.children.get(node, [])

    def _grow_matches(self, candidates: CandidateTree, budget: TreeBudget) -> None:
        assert self._matches is not None
        depths, scores, parents = self._matches.depths, self._matches.scores, self._matches.parents
        made = {-1: 0}  # recorded match -> candidate
        for depth in range(1, max(depths, default=0) + 1):
            level = [i for i, one in enumerate(depths) if one == depth and parents[i] in made]
            if not budget.wants_level(candidates.levels):
                break
            steps = [scores[i] - (scores[parents[i]] if parents[i] >= 0 else 0.0) for i in level]
            first = candidates.add_level([made[parents[i]] for i in level], [i + 1 for i in level], steps)
            made |= {one: first + place for place, one in enumerate(level)}

    def tell(self, verified: Verified) -> None:
        """It knows the text."""

    def truncate(self, known: int) -> None:
        """It knows the text."""

    def close(self) -> None:
        """It holds nothing."""


def candidates(
    texts: Sequence[TextRecords],
    costs: Costs,
    *,
    width: int,
    default: TreeShape,
    most_nodes: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Candidates:
    """The best of each kind on `texts`. `width`: the most children that the draft gives; `default`: a tree beside;
    `most_nodes`: of one text's tree.
    """
    widths = [w for w in WIDTHS if w <= width]
    chances = acceptance.chances(texts)
    contexts = [record.context for text in texts for record in text]
    prices = costs.at(sum(contexts) // len(contexts))
    by_rank_widths = [1] if costs.branches_cost else widths  # a node is a row only in a chain, or under a mask
    round_ms = functools.partial(_round_ms, prices)
    optimum = best_by_rank(chances.by_rank, round_ms, prices.plain, most_nodes, by_rank_widths)
    plain = _candidate(Policy("plain"), texts, costs)
    lookup = _settled(Policy("lookup"), texts, costs, plain.replay, plain.replay)
    # From several places: the optimum by rank knows nothing of what confidence adds, and hills may be in between.
    starts = [_filled(tree) for tree in (optimum.tree, default, TreeShape(4, 3, 1)) if tree != PLAIN_TREE]
    search = _Search(texts, costs, chances, plain.replay)
    climbed = [search.climb(start, len(chances.by_rank), widths, most_nodes, lookup.replay) for start in starts]
    fixed = max(climbed, key=lambda one: one.replay.tokens_per_second)
    progress(0.4)
    adaptive = None
    for i, rows in enumerate(widths, 1):
        policy = Policy("adaptive", TreeShape(most_nodes, len(chances.by_rank), rows), chances)
        candidate = _settled(policy, texts, costs, plain.replay, fixed.replay)
        if adaptive is None or candidate.replay.tokens_per_second > adaptive.replay.tokens_per_second:
            adaptive = candidate
        progress(0.4 + 0.6 * i / len(widths))
    assert adaptive is not None
    untouched = _candidate(Policy("fixed", default, gain=UNMEASURED_GAIN), texts, costs)
    return Candidates(plain, lookup, fixed, adaptive, untouched, optimum, chances)


def _round_ms(prices: Prices, nodes: int, depth: int, width: int) -> float:
    load = PassLoad(prices, texts=1, rows=1, gain=1.0)
    return (prices.pass_ms(nodes) if nodes > 1 else prices.plain) + load.draft_ms(depth, width, 1)


def _candidate(policy: Policy, texts: Sequence[TextRecords], costs: Costs) -> Candidate:
    return Candidate(policy, replay(texts, policy, costs))


def _settled(policy: Policy, texts: Sequence[TextRecords], costs: Costs, plain: Replay, begin: Replay) -> Candidate:
    """With the gain over plain decoding that it then reaches itself (Dinkelbach 1967); that of `begin` is the first
    guess.
    """
    gain, best = begin.tokens_per_second / plain.tokens_per_second, None
    for _ in range(_SETTLING):
        candidate = _candidate(dataclasses.replace(policy, gain=gain), texts, costs)
        reached = candidate.replay.tokens_per_second / plain.tokens_per_second
        if best is None or candidate.replay.tokens_per_second > best.replay.tokens_per_second:
            best = candidate
        if abs(reached - gain) < _SETTLED * gain:
            break
        gain = reached
    assert best is not None
    return best


def _filled(tree: TreeShape) -> TreeShape:
    """`tree` without nodes that its depth and width can never offer."""
    offered = tree.width + (tree.depth - 1) * tree.width**2 if tree.depth else 0
    return dataclasses.replace(tree, nodes=min(tree.nodes, 1 + offered))


@dataclasses.dataclass(frozen=True, slots=True)
class _Search:
    """Fixed trees on the same texts."""

    texts: Sequence[TextRecords]
    costs: Costs
    chances: Chances
    plain: Replay

    def fixed(self, tree: TreeShape, begin: Replay) -> Candidate:
        return _settled(Policy("fixed", tree, self.chances), self.texts, self.costs, self.plain, begin)

    def climb(self, start: TreeShape, deepest: int, widths: Sequence[int], most_nodes: int, begin: Replay) -> Candidate:
        """From `start`, one of nodes, depth and width at a time, for as long as that gains on the texts."""
        best, seen = self.fixed(start, begin), {start}
        nodes = [count for count in self.costs.nodes if count <= most_nodes]
        improved = True
        while improved:
            improved = False
            for tree in map(_filled, _neighbours(best.tree, nodes, deepest, widths)):
                if tree not in seen:
                    seen.add(tree)
                    candidate = self.fixed(tree, best.replay)
                    if candidate.replay.tokens_per_second > best.replay.tokens_per_second:
                        best, improved = candidate, True
        return best


def _neighbours(tree: TreeShape, nodes: Sequence[int], deepest: int, widths: Sequence[int]) -> Iterator[TreeShape]:
    near = sorted({n for n in nodes if n > 1} | {tree.nodes})
    i = near.index(tree.nodes)
    for count in near[max(i - 2, 0) : i + 3]:
        yield dataclasses.replace(tree, nodes=count)
    for depth in range(max(tree.depth - 2, 1), min(tree.depth + 2, deepest) + 1):
        yield dataclasses.replace(tree, depth=depth)
        yield dataclasses.replace(tree, depth=depth, nodes=max(tree.nodes + depth - tree.depth, 2))
    j = min(range(len(widths)), key=lambda k: abs(widths[k] - tree.width))
    for width in widths[max(j - 1, 0) : j + 2]:
        yield dataclasses.replace(tree, width=width)


def sweep(
    texts: Sequence[TextRecords],
    costs: Costs,
    nodes: Sequence[int],
    depths: Sequence[int],
    width: int,
    begin: Candidate,
    plain: Replay,
) -> dict[tuple[int, int], float]:
    """Foretold tokens per second of every fixed tree of `nodes` x `depths`; `begin` is one that is like them."""
    assert begin.policy.chances is not None
    search = _Search(texts, costs, begin.policy.chances, plain)
    return {
        (count, depth): search.fixed(TreeShape(count, depth, width), begin.replay).replay.tokens_per_second
        for count, depth in itertools.product(nodes, depths)
    }
