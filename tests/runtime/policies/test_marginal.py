"""Proves what the policies decide: trees as large as the curve's steps allow, a stop where a level no longer pays,
prices of the right context, rest where a text's draft falls behind, and never another token than plain decoding's.
"""

from __future__ import annotations

import fakes
import numpy as np
import planted
import pytest
from dovetail.runtime.decoding.rounds import rounds
from dovetail.runtime.drafts.lookup_or_model import MixedDraft
from dovetail.runtime.policies.lookup_or_model import MixedPolicy
from dovetail.runtime.policies.marginal import SCORE_STEP, Chances, MarginalPolicy
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.drafts.base import Draft, NoDraft
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.policies.base import NO_GROWTH, PLAIN, FixedPolicy, Growth, Policy
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.trees.shape import TreeShape

HONEST = tuple(float(np.exp(-SCORE_STEP * (i + 0.5))) for i in range(70))
BY_RANK = ((0.6, 0.2, 0.1, 0.05),) * 8
CHANCES = Chances(HONEST, BY_RANK)
LIMIT = TreeShape(32, 8, 4)


def costs(step_at: int = 8, *, draft_ms: float = 0.1) -> Costs:
    """A pass of 10 ms up to `step_at` nodes and 30 ms above; at 1,000 tokens of context the step comes at 4 nodes."""
    nodes = tuple(range(1, 33))
    near, far = (tuple(10.0 if n <= at else 30.0 for n in nodes) for at in (step_at, 4))
    return Costs(
        (100, 1000), nodes, (1, 4), (10.0, 10.0), (near, far), (draft_ms,) * 2, ((draft_ms,) * 2,) * 2, 0, 0, 0
    )


def grown(growth: Growth, levels: list[list[float]]) -> tuple[int, int]:
    """(levels, drafted nodes) when the draft's levels have these probabilities."""
    if not growth.goes_on(0, [0.0]):
        return 0, 0
    depth, scores = 0, list[float]()
    for level in levels:
        depth += 1
        newest = np.log(level).tolist()
        scores += newest
        if not growth.goes_on(depth, newest):
            break
    return depth, growth.drafted(sorted(scores, reverse=True))


LEVELS = [[0.7, 0.2, 0.05, 0.02], [0.5, 0.1, 0.05, 0.04], [0.35, 0.08, 0.05, 0.04], [0.2, 0.05, 0.04, 0.03]]


@pytest.mark.parametrize("step_at", [4, 6, 8])
def test_nodes_fill_a_step_and_stop_before_the_next(step_at: int) -> None:
    policy = MarginalPolicy(costs(step_at), CHANCES, LIMIT, rate=0.2)
    assert grown(policy.growth(100, 100), LEVELS)[1] + 1 == step_at


def test_a_longer_context_moves_to_its_own_prices() -> None:
    policy = MarginalPolicy(costs(8), CHANCES, LIMIT, rate=0.2)
    assert grown(policy.growth(100, 100), LEVELS)[1] + 1 == 8
    assert grown(policy.growth(100, 1500), LEVELS)[1] + 1 == 4


def test_chances_drop_what_is_not_worth_a_look() -> None:
    scores = [0.0, -0.05, -0.1, -0.31, -6.95, -7.0, -50.0]
    found = CHANCES.of(scores, 0.005)
    assert found == [HONEST[0], HONEST[0], HONEST[1], HONEST[3]]
    assert CHANCES.of(scores, 0.8) == found[:3]
    assert len(CHANCES.of([-SCORE_STEP * step for step in range(100)], 0.0)) >= 69


def test_levels_stop_where_they_no_longer_pay() -> None:
    cheap = MarginalPolicy(costs(), CHANCES, LIMIT, rate=0.2).growth(100, 100)
    dear = MarginalPolicy(costs(draft_ms=1.5), CHANCES, LIMIT, rate=0.2).growth(100, 100)
    assert grown(cheap, LEVELS)[0] == len(LEVELS)
    assert grown(dear, LEVELS)[0] < len(LEVELS)
    hopeless = [[1e-4] * 4] * 4
    fresh = MarginalPolicy(costs(), CHANCES, LIMIT, rate=0.2).growth(100, 100)
    assert grown(fresh, hopeless) == (1, 0)


def test_confidence_decides_this_round() -> None:
    policy = MarginalPolicy(costs(draft_ms=1.0), CHANCES, LIMIT, rate=0.2)
    sure = grown(policy.growth(100, 100), [[0.95], [0.9], [0.86], [0.82], [0.78]])
    unsure = grown(policy.growth(100, 100), [[0.3], [0.1], [0.03], [0.01], [0.003]])
    assert sure[0] > unsure[0]
    assert sure[1] > unsure[1]


def test_a_round_fits_its_room_and_its_limit() -> None:
    policy = MarginalPolicy(costs(32), CHANCES, TreeShape(5, 3, 4), rate=0.2)
    assert grown(policy.growth(3, 100), LEVELS)[0] == 2
    assert grown(policy.growth(100, 100), LEVELS) == (3, 4)
    assert policy.growth(1, 100) is NO_GROWTH


def test_what_a_text_accepts_corrects_the_chances() -> None:
    # Prices per node are even, so the number of nodes follows the chances.
    nodes = tuple(range(1, 33))
    even = Costs((100,), nodes, (1, 4), (10.0,), (tuple(10.0 + n for n in nodes),), (0.1,), ((0.1, 0.1),), 0, 0, 0)

    def after(accept_length: int) -> int:
        policy = MarginalPolicy(even, CHANCES, LIMIT, rate=0.12)
        for _ in range(60):
            if grown(policy.growth(100, 100), LEVELS)[0] == 0:
                break
            policy.observe(accept_length)
        return grown(policy.growth(100, 100), LEVELS)[1]

    assert after(4) > after(1)


def test_a_text_that_falls_behind_rests_longer_and_longer() -> None:
    policy = MarginalPolicy(costs(draft_ms=2.0), CHANCES, LIMIT, rate=0.13)
    drafted = []
    for _ in range(1500):
        growth = policy.growth(1000, 100)
        drafted.append(grown(growth, LEVELS)[0] > 0)
        policy.observe(0)
    assert drafted[0]
    first = drafted.index(False)
    assert first < 40
    assert sum(drafted[-1000:]) < 40
    policy.begin()
    assert grown(policy.growth(1000, 100), LEVELS)[0] > 0, "another text begins afresh"


def test_a_text_that_pays_never_rests() -> None:
    policy = MarginalPolicy(costs(), CHANCES, LIMIT, rate=0.13)
    for _ in range(500):
        assert grown(policy.growth(1000, 100), LEVELS)[0] > 0
        policy.observe(2)


def test_a_round_that_the_guard_skipped_teaches_nothing() -> None:
    policy = MarginalPolicy(costs(), CHANCES, LIMIT, rate=0.13)
    for _ in range(500):
        policy.growth(1000, 100)  # nobody asks it anything: the guard's draft rests
        policy.observe(0)
    assert grown(policy.growth(1000, 100), LEVELS)[0] > 0


@given(
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.floats(0, 1),
    st.integers(1, 32),
    st.sampled_from([0.0, 1.0, 20.0]),
)
def test_first_law(temperature: float, seed: int, count: int, skill: float, step_at: int, draft_ms: float) -> None:
    """With any prices and any draft the tokens are those of plain decoding."""
    prompt = np.array([1, 2, 3], np.int64)
    pair = planted.PlantedPair(lambda nodes: 0.0, lambda rows: 0.0, skill=skill)

    def run(policy: Policy, draft: Draft) -> list[int]:
        config = GenerationConfig(temperature=temperature, seed=seed)
        target, sampler = fakes.FakeTarget(planted.VOCAB), Sampler(config, prompt.tolist(), planted.VOCAB)
        made = rounds(target, draft, policy, sampler.draw, prompt, count)
        return [token for done in made for token in done.tokens]

    prices = costs(step_at, draft_ms=draft_ms + 0.01)
    plain = run(FixedPolicy(PLAIN), NoDraft())
    assert run(MarginalPolicy(prices, CHANCES, LIMIT, rate=0.2), pair.reader()) == plain
    mixed = MixedPolicy(MarginalPolicy(prices, CHANCES, LIMIT, rate=0.2), prices, rate=0.2)
    assert run(mixed, MixedDraft(pair.reader(), LookupDraft())) == plain
    assert len(plain) == count
