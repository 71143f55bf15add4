"""Choosing: the policy that makes most tokens per second out of measured costs and recorded acceptance.

Two kinds of the draft's trees compete with plain decoding and with matches in the text alone. A *static* one has the
same number of nodes, depth and width every round; it begins at the optimum for acceptance by rank alone (Sequoia, Chen
et al. 2024, arXiv 2402.12374) and moves to the best on the recorded texts. A *dynamic* one is grown by
`MarginalPolicy`. Both stand behind matches (`MixedPolicy`), and are replayed on the same records with the same code
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
from dovetail.calibration.measure.acceptance import Record, TextRecords
from dovetail.calibration.measure.latency import WIDTHS
from dovetail.runtime.policies.base import PLAIN, FixedPolicy, Growth, Policy
from dovetail.runtime.policies.costs import Costs, PriceList
from dovetail.runtime.policies.lookup_or_model import MixedPolicy, unmeasured
from dovetail.runtime.policies.marginal import Chances, MarginalPolicy
from dovetail.runtime.trees.shape import TreeShape

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
    """A policy, how to make it anew, and its replay."""

    kind: str  # plain, lookup, static or dynamic
    tree: TreeShape
    make: Callable[[], Policy]
    replay: Replay


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """The best of each kind on one set of texts."""

    plain: Candidate
    lookup: Candidate
    static: Candidate
    dynamic: Candidate
    default: Candidate  # what runs where nothing was calibrated
    by_rank: RankOptimum
    chances: Chances

    def named(self) -> dict[str, Candidate]:
        """By the names under which they are compared."""
        kinds = (self.plain, self.lookup, self.static, self.dynamic)
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
    best = RankOptimum(PLAIN, 0.0, 1 / plain_ms)
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
    """Decode the recorded texts with `policy`: its rounds begin where the last one ended, and the last one ends with
    the text, as in `engine.rounds`.
    """
    prices = PriceList(costs)
    rounds = tokens = nodes = levels = 0
    ms, lengths = 0.0, Counter[int]()
    for text in texts:
        policy.begin()
        position = 0
        while position < len(text):
            found = text[position]
            room = len(text) - position
            growth = policy.growth(room, found.context)
            accepted, size, depth = match(found, growth) or grow(found, growth)
            accepted = min(accepted, room - 1)
            policy.observe(accepted)
            ms += prices.at(found.context).round_ms(size, depth, growth.width)
            rounds, tokens, nodes, levels = rounds + 1, tokens + accepted + 1, nodes + size, levels + depth
            lengths[accepted] += 1
            position += accepted + 1
    return Replay(rounds, tokens, ms, nodes, levels, lengths)


def match(found: Record, growth: Growth) -> tuple[int, int, int] | None:
    """(accept length, nodes, 0 levels) of the matches that `growth` takes of those recorded, None if it takes none."""
    offered, matches = found.matches, growth.matches
    if matches is None or not offered.scores:
        return None
    within = [i for i, depth in enumerate(offered.depths) if matches.goes_on(depth - 1, [0.0])]
    kept = set(within[: matches.drafted([offered.scores[i] for i in within])])
    accepted = next((i for i, node in enumerate(offered.path) if node not in kept), len(offered.path))
    return (accepted, len(kept) + 1, 0) if kept else None


def grow(found: Record, growth: Growth) -> tuple[int, int, int]:
    """(accept length, nodes, levels) of the tree that `growth` makes of recorded candidates, as a draft would."""
    if not growth.goes_on(0, [0.0]):
        return 0, 1, 0
    scores, width, depth = found.scores, growth.width, 1
    level = found.children[0][:width]
    offered = list(level)
    while growth.goes_on(depth, [scores[node] for node in level]):
        expanded = sorted(level, key=scores.__getitem__, reverse=True)[:width]
        level = [child for node in expanded for child in found.children.get(node, ())[:width]]
        offered += level
        depth += 1
    offered.sort(key=scores.__getitem__, reverse=True)
    kept = set(offered[: growth.drafted([scores[node] for node in offered])])
    accepted = next((i for i, node in enumerate(found.path) if node not in kept), len(found.path))
    return accepted, len(kept) + 1, depth


def candidates(
    texts: Sequence[TextRecords],
    costs: Costs,
    *,
    width: int,
    default: TreeShape,
    progress: Callable[[float], None] = lambda share: None,
) -> Candidates:
    """The best of each kind on `texts`. `width`: the most children that the draft gives; `default`: a tree beside."""
    widths = [w for w in WIDTHS if w <= width]
    chances = acceptance.chances(texts)
    contexts = [found.context for text in texts for found in text]
    prices = costs.at(sum(contexts) // len(contexts))
    optimum = best_by_rank(chances.by_rank, prices.round_ms, prices.plain, costs.nodes[-1], widths)
    plain = _candidate("plain", PLAIN, lambda: FixedPolicy(PLAIN), texts, costs)
    lookup = _mixed("lookup", PLAIN, lambda rate: FixedPolicy(PLAIN), texts, costs, plain.replay)
    # From several places: the optimum by rank knows nothing of what confidence adds, and hills may be in between.
    starts = [_filled(tree) for tree in (optimum.tree, default, TreeShape(4, 3, 1)) if tree != PLAIN]
    climbed = [_climb(start, texts, costs, len(chances.by_rank), widths, lookup.replay) for start in starts]
    static = max(climbed, key=lambda one: one.replay.tokens_per_second)
    progress(0.4)
    dynamic = None
    for done, rows in enumerate(widths, 1):
        limit = TreeShape(costs.nodes[-1], len(chances.by_rank), rows)
        grown = functools.partial(MarginalPolicy, costs, chances, limit)
        found = _mixed("dynamic", limit, grown, texts, costs, static.replay)
        if dynamic is None or found.replay.tokens_per_second > dynamic.replay.tokens_per_second:
            dynamic = found
        progress(0.4 + 0.6 * done / len(widths))
    assert dynamic is not None
    untouched = _candidate("default", default, lambda: unmeasured(FixedPolicy(default)), texts, costs)
    return Candidates(plain, lookup, static, dynamic, untouched, optimum, chances)


def _candidate(
    kind: str, tree: TreeShape, make: Callable[[], Policy], texts: Sequence[TextRecords], costs: Costs
) -> Candidate:
    return Candidate(kind, tree, make, replay(texts, make(), costs))


def _mixed(
    kind: str,
    tree: TreeShape,
    make: Callable[[float], Policy],
    texts: Sequence[TextRecords],
    costs: Costs,
    begin: Replay,
) -> Candidate:
    """What `make` gives for a rate, behind matches, with the rate that both then reach themselves (Dinkelbach 1967);
    that of `begin` is the first guess.
    """
    rate, best = begin.tokens / begin.ms, None
    for _ in range(_SETTLING):
        found = _candidate(kind, tree, functools.partial(_behind_matches, make, costs, rate), texts, costs)
        reached = found.replay.tokens / found.replay.ms
        if best is None or reached > best.replay.tokens / best.replay.ms:
            best = found
        if abs(reached - rate) < _SETTLED * rate:
            break
        rate = reached
    assert best is not None
    return best


def _behind_matches(make: Callable[[float], Policy], costs: Costs, rate: float) -> Policy:
    return MixedPolicy(make(rate), costs, rate)


def _static(tree: TreeShape, texts: Sequence[TextRecords], costs: Costs, begin: Replay) -> Candidate:
    return _mixed("static", tree, lambda rate: FixedPolicy(tree), texts, costs, begin)


def _filled(tree: TreeShape) -> TreeShape:
    """`tree` without nodes that its depth and width can never offer."""
    offered = tree.width + (tree.depth - 1) * tree.width**2 if tree.depth else 0
    return dataclasses.replace(tree, nodes=min(tree.nodes, 1 + offered))


def _climb(
    start: TreeShape,
    texts: Sequence[TextRecords],
    costs: Costs,
    deepest: int,
    widths: Sequence[int],
    begin: Replay,
) -> Candidate:
    """From `start`, one of nodes, depth and width at a time, for as long as that gains on the texts."""
    best, seen = _static(start, texts, costs, begin), {start}
    improved = True
    while improved:
        improved = False
        for tree in map(_filled, _neighbours(best.tree, costs.nodes, deepest, widths)):
            if tree not in seen:
                seen.add(tree)
                found = _static(tree, texts, costs, best.replay)
                if found.replay.tokens_per_second > best.replay.tokens_per_second:
                    best, improved = found, True
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
    begin: Replay,
) -> dict[tuple[int, int], float]:
    """Foretold tokens per second of every static tree of `nodes` x `depths`; `begin` is one that is like them."""
    return {
        (count, depth): _static(TreeShape(count, depth, width), texts, costs, begin).replay.tokens_per_second
        for count, depth in itertools.product(nodes, depths)
    }
