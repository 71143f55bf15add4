"""Proves what an adaptive tree is made by: as many nodes as the curve's steps allow, a stop where a level no longer
pays, prices of the right context, and what a text has taught of its draft.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.decoding.round_planner import Offer, PassLoad, RoundPlanner
from dovetail.runtime.policies.adaptive import AdaptiveBudget, promised_gain
from dovetail.runtime.policies.base import ChainBudget, DepthBudget, TreeBudget
from dovetail.runtime.policies.chances import SCORE_STEP, Chances, best_count
from dovetail.runtime.policies.costs import Costs, PriceList
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import CandidateTree

HONEST = tuple(float(np.exp(-SCORE_STEP * (i + 0.5))) for i in range(70))
BY_RANK = ((0.6, 0.2, 0.1, 0.05),) * 8
CHANCES = Chances(HONEST, BY_RANK)
LIMIT = TreeShape(32, 8, 4)
LEVELS = [[0.7, 0.2, 0.05, 0.02], [0.5, 0.1, 0.05, 0.04], [0.35, 0.08, 0.05, 0.04], [0.2, 0.05, 0.04, 0.03]]


def costs(step_at: int = 8, *, draft_ms: float = 0.1) -> Costs:
    """A pass of 10 ms up to `step_at` nodes and 30 ms above; at 1,000 tokens of context the step comes at 4 nodes."""
    nodes = tuple(range(1, 33))
    near, far = (tuple(10.0 if n <= at else 30.0 for n in nodes) for at in (step_at, 4))
    return Costs(
        (100, 1000),
        nodes,
        (1, 4),
        (10.0, 10.0),
        (near, far),
        (draft_ms,) * 2,
        ((draft_ms,) * 2,) * 2,
        (0.0, 0.0),
        host_ms=0,
        host_level_ms=0,
        host_node_ms=0,
    )


def budget(
    prices: Costs, *, context: int = 100, gain: float = 2.0, tree: TreeShape = LIMIT, trust: float = 1.0
) -> Grower:
    """Of one text, of which `gain` times plain decoding's speed is kept up."""
    load = PassLoad(PriceList(prices).at(context), texts=1, rows=1, gain=gain)
    adaptive = AdaptiveBudget(
        CHANCES,
        width=tree.width,
        depth=tree.depth,
        passes=load.passes(tree.nodes - 1),
        level_ms=load.prices.level_ms(tree.width),
        rate=load.rate,
        trust=trust,
    )
    return Grower(RoundPlanner(prices), load, adaptive, tree, trust)


class Grower:
    def __init__(
        self, planner: RoundPlanner, load: PassLoad, budget: TreeBudget, tree: TreeShape, trust: float
    ) -> None:
        self._planner, self._load, self._budget, self._tree, self._trust = planner, load, budget, tree, trust

    def grown(self, levels: list[list[float]]) -> tuple[int, int]:
        """(levels, verified nodes) when the draft's levels have these probabilities of whole paths."""
        scores: list[list[float]] = []
        while self._budget.wants_level(scores):
            assert self._budget.wants_level(scores), "asked twice, the answer is the same"
            if len(scores) == len(levels):
                break
            scores.append(np.log(levels[len(scores)]).tolist())
        ranked = sorted((score for level in scores for score in level), reverse=True)[: self._tree.nodes - 1]
        chances = [self._trust * chance for chance in CHANCES.of(ranked, 0.0)]
        offer = Offer(chances, [1] * len(chances))
        return len(scores), self._planner.choose(self._load, [offer]).counts[0]


@pytest.mark.parametrize("step_at", [4, 6, 8])
def test_nodes_fill_a_step_and_stop_before_the_next(step_at: int) -> None:
    assert budget(costs(step_at)).grown(LEVELS)[1] + 1 == step_at


def test_a_longer_context_moves_to_its_own_prices() -> None:
    assert budget(costs(8), context=100).grown(LEVELS)[1] + 1 == 8
    assert budget(costs(8), context=1500).grown(LEVELS)[1] + 1 == 4


def test_chances_drop_what_is_not_worth_a_look() -> None:
    scores = [0.0, -0.05, -0.1, -0.31, -6.95, -7.0, -50.0]
    found = CHANCES.of(scores, 0.005)
    assert found == [HONEST[0], HONEST[0], HONEST[1], HONEST[3]]
    assert CHANCES.of(scores, 0.8) == found[:3]
    every = CHANCES.of([-SCORE_STEP * (step + 0.5) for step in range(100)], 0.0)
    assert every == list(HONEST[:-1]), "of what the table tells apart, where all are wanted"


def test_levels_stop_where_they_no_longer_pay() -> None:
    assert budget(costs()).grown(LEVELS)[0] == len(LEVELS)
    assert budget(costs(draft_ms=1.5)).grown(LEVELS)[0] < len(LEVELS)
    hopeless = [[1e-4] * 4] * 4
    assert budget(costs()).grown(hopeless)[0] == 1


def test_confidence_decides_this_round() -> None:
    sure = budget(costs(draft_ms=1.0)).grown([[0.95], [0.9], [0.86], [0.82], [0.78]])
    unsure = budget(costs(draft_ms=1.0)).grown([[0.3], [0.1], [0.03], [0.01], [0.003]])
    assert sure[0] > unsure[0]
    assert sure[1] > unsure[1]


def test_a_round_fits_its_limit() -> None:
    assert budget(costs(32), tree=TreeShape(5, 2, 4)).grown(LEVELS)[0] == 2
    assert budget(costs(32), tree=TreeShape(5, 3, 4)).grown(LEVELS) == (3, 4)
    assert budget(costs(32), tree=TreeShape(5, 0, 4)).grown(LEVELS) == (0, 0)


def test_a_faster_text_wants_less_of_what_costs() -> None:
    """Time is dearer to whom it brings more tokens."""
    prices = costs(draft_ms=1.2)
    depths = [budget(prices, gain=gain).grown(LEVELS)[0] for gain in (1.0, 2.0, 3.0, 5.0)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > depths[-1]


def test_what_a_text_accepts_corrects_the_chances() -> None:
    """Prices per node are even, so the number of nodes follows the chances."""
    nodes = tuple(range(1, 33))
    even = Costs(
        (100,), nodes, (1, 4), (10.0,), (tuple(10.0 + n for n in nodes),), (0.1,), ((0.1, 0.1),), (0.0,), 0, 0, 0
    )
    believed, doubted = (budget(even, gain=1.2, trust=trust).grown(LEVELS) for trust in (1.2, 0.5))
    assert believed[1] > doubted[1]
    assert believed[0] >= doubted[0]


@given(
    st.lists(st.floats(0, 1), max_size=12),
    st.lists(st.floats(0, 5), min_size=1, max_size=14),
    st.floats(0, 2),
    st.floats(0, 2),
)
def test_best_count_is_the_best_of_all(chances: list[float], steps: list[float], rate: float, trust: float) -> None:
    chances = sorted(chances, reverse=True)
    passes = np.cumsum(steps).tolist()
    gains = [
        trust * sum(chances[:n]) - rate * (passes[n] - passes[0]) for n in range(min(len(chances), len(passes) - 1) + 1)
    ]
    count, gain = best_count(chances, passes, rate, trust)
    assert gain == pytest.approx(max(gains), abs=1e-9)
    assert gain == pytest.approx(gains[count], abs=1e-9)


@given(
    st.lists(st.lists(st.floats(0.01, 0.9), min_size=3, max_size=3), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.floats(0, 0.5),
    st.floats(0, 0.3),
    st.floats(0.3, 2),
)
def test_what_a_tree_promises_is_the_best_of_all_depths(
    by_rank: list[list[float]], width: int, depth: int, rate: float, level_ms: float, trust: float
) -> None:
    """Against all nodes of every depth, each path's chance by its ranks."""
    ranks = [sorted(row, reverse=True) for row in by_rank]
    passes = [10.0 + (0.0 if nodes <= 4 else 0.7 * nodes) for nodes in range(40)]
    gains = [0.0]
    level, nodes = [1.0], list[float]()
    for levels in range(1, depth + 1):
        row = ranks[min(levels, len(ranks)) - 1]
        level = sorted([parent * row[rank] for parent in level for rank in range(width)])[::-1][:width]
        nodes += level
        best = max(
            trust * sum(sorted(nodes)[::-1][:count]) - rate * (passes[count] - passes[0])
            for count in range(len(nodes) + 1)
        )
        gains.append(best - rate * level_ms * levels)
    found = promised_gain(
        Chances(HONEST, tuple(map(tuple, ranks))),
        width=width,
        depth=depth,
        passes=passes,
        draft_ms=lambda levels: level_ms * levels,
        rate=rate,
        trust=trust,
    )
    assert found == pytest.approx(max(gains), abs=1e-2)


@given(st.lists(st.lists(st.floats(-9, 0), min_size=1, max_size=8), max_size=6))
def test_a_chain_goes_as_deep_without_siblings(levels: list[list[float]]) -> None:
    other = DepthBudget(4, 3)
    chain = ChainBudget(other)
    assert chain.width == 1
    assert chain.wants_level(levels) == other.wants_level(levels) == (len(levels) < 4)


@given(st.integers(0, 2**32 - 1))
def test_a_budget_remembers_nothing(seed: int) -> None:
    """Trees that grow in turns are those that grow one after the other."""
    rng = np.random.default_rng(seed)
    load = PassLoad(PriceList(costs()).at(100), texts=1, rows=1, gain=1.5)
    one = AdaptiveBudget(
        CHANCES,
        width=3,
        depth=5,
        passes=load.passes(20),
        level_ms=0.4,
        rate=load.rate,
        trust=float(rng.uniform(0.2, 2)),
    )
    trees = [CandidateTree(0) for _ in range(3)]
    for _ in range(5):
        for tree in trees:
            expanded = tree.frontier(3) if tree.depth else [0]
            tree.extend(expanded, [[1, 2, 3]] * len(expanded), (-rng.exponential(1, (len(expanded), 3))).tolist())
    whole = [tree.levels for tree in trees]
    in_turns = [[one.wants_level(levels[:depth]) for levels in whole] for depth in range(6)]
    alone = [[one.wants_level(levels[:depth]) for depth in range(6)] for levels in whole]
    assert in_turns == [list(column) for column in zip(*alone, strict=True)]
