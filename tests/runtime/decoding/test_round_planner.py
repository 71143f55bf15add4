"""Proves how a pass is filled: prompts get what is left beside the texts that decode, never in crumbs; and of all
texts' candidates those are verified that no other choice would beat, by trying all.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.runtime.decoding.round_planner import (
    PROMPT_TOKENS,
    PROMPT_TOKENS_BESIDE,
    Offer,
    PassLoad,
    RoundPlanner,
)
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.policies.costs import ASSUMED, Costs, Prices
from dovetail.runtime.policies.pace import Pace, Verdict, speed_gain
from dovetail.runtime.trees.shape import TreeShape

unread = st.lists(st.one_of(st.just(1), st.just(2), st.integers(1, 5), st.integers(1, 1000)), min_size=1, max_size=20)


@given(unread)
def test_prompts_are_read_in_whole_chunks(counts: list[int]) -> None:
    shares = RoundPlanner(ASSUMED).prompt_tokens(counts)
    budget = PROMPT_TOKENS_BESIDE if 1 in counts else PROMPT_TOKENS
    assert len(shares) == len(counts)
    prompts = [(count, share) for count, share in zip(counts, shares, strict=True) if count > 1]
    assert all(share == 1 for count, share in zip(counts, shares, strict=True) if count == 1), (
        "every root is in the pass"
    )
    assert sum(share for _, share in prompts) <= budget
    for count, share in prompts:
        assert share == 0 or 2 <= share <= count, "a single token is a root"
        assert count - share != 1, "what is left would be a single token"
    if prompts:
        count, share = prompts[0]
        assert share >= min(count, budget) - 1, "first come, first served"
    left = budget - sum(share for _, share in prompts)
    assert left <= 2 or all(count == share for count, share in prompts), "nothing is wasted"


@given(st.lists(st.integers(2, 1000), min_size=1, max_size=6), st.integers(0, 4))
def test_every_prompt_is_read_in_the_end(counts: list[int], decoding: int) -> None:
    planner, left, passes = RoundPlanner(ASSUMED), list(counts), 0
    while any(count > 1 for count in left):
        shares = planner.prompt_tokens([1] * decoding + left)[decoding:]
        left = [count - share if count > 1 else count for count, share in zip(left, shares, strict=True)]
        left = [count for count in left if count]
        passes += 1
        assert passes <= sum(counts) / (PROMPT_TOKENS_BESIDE - 3) + len(counts) + 1


def offers(most: int) -> st.SearchStrategy[list[Offer]]:
    chances = st.lists(st.sampled_from([0.9, 0.75, 0.5, 0.3, 0.1, 0.05, 0.0]), max_size=most)
    falling = chances.map(lambda values: sorted(values, reverse=True))
    return st.lists(st.builds(Offer, falling, st.sampled_from([False, False, True])), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(offers(4), st.lists(st.floats(0, 3), min_size=16, max_size=16), st.integers(0, 3), st.floats(0.5, 4), st.data())
def test_no_other_choice_gains_more(
    given_offers: list[Offer], steps: list[float], prompt: int, gain: float, data: st.DataObject
) -> None:
    """Against every way to take so many of each text's best."""
    texts = len(given_offers)
    passes = (0.0, *itertools.accumulate(steps, initial=5.0))
    prices = Prices(plain=6.0, passes=passes, text=0.3, first=1.0, levels=(0.0, 1.0))
    load = PassLoad(prices, texts, rows=prompt + texts, gain=gain)
    planner = RoundPlanner(ASSUMED)
    chosen = planner.choose(load, given_offers)
    assert chosen == planner.choose(load, given_offers), "the question changes nothing"

    def gained(counts: tuple[int, ...]) -> float:
        tokens = sum(sum(offer.chances[:count]) for offer, count in zip(given_offers, counts, strict=True))
        rows = load.rows + sum(counts)
        return tokens - load.rate * (prices.pass_ms(rows, texts) - prices.pass_ms(load.rows, texts))

    fixed = [len(offer.chances) if offer.is_fixed else 0 for offer in given_offers]
    ways = itertools.product(
        *(range(low, len(offer.chances) + 1) for offer, low in zip(given_offers, fixed, strict=True))
    )
    assert gained(tuple(chosen)) == pytest.approx(max(map(gained, ways)), abs=1e-9)
    for offer, count, least in zip(given_offers, chosen, fixed, strict=True):
        assert least <= count <= len(offer.chances)


def test_a_step_of_the_curve_is_shared_by_who_makes_most_of_it() -> None:
    """Eight rows cost what one does: three roots leave five places."""
    load = RoundPlanner(ASSUMED).load([Pace(Policy("plain"))] * 3, [100, 100, 100], 0)
    counts = RoundPlanner(ASSUMED).choose(load, [Offer([0.9, 0.8, 0.7]), Offer([0.05] * 3), Offer([0.6, 0.5, 0.01])])
    assert counts == [3, 0, 2]


def test_a_pass_is_priced_by_its_texts_and_their_context() -> None:
    nodes = (1, 64)
    costs = Costs((100, 900), nodes, (1,), (1, 9), ((2, 2), (10, 10)), (1, 1), ((1,), (1,)), (0.5, 0.5), 0, 0, 0)
    paces = [Pace(Policy("fixed", TreeShape(8, 3, 2), gain=gain)) for gain in (2.0, 3.0)]
    load = RoundPlanner(costs).load(paces, [0, 1000], 7)
    assert (load.texts, load.rows) == (2, 9)
    assert load.gain == pytest.approx(1 + (speed_gain(paces) - 1) / 2), "what they gained alone they share"
    assert load.prices.plain_ms() == pytest.approx(5, abs=0.5), "of the mean context"
    assert load.plain_rate == pytest.approx(2 / load.prices.plain_ms(2))
    assert load.rate == pytest.approx(load.gain * load.plain_rate)
    assert load.passes(2) == [load.prices.pass_ms(rows, 2) for rows in (9, 10, 11)]
    assert load.draft_ms(0, 4, 2) == 0
    calls = load.prices.first_ms(2) + 2 * load.prices.level_ms(8)
    assert load.draft_ms(3, 4, 2) == pytest.approx(calls / 2)


def test_a_question_changes_nothing() -> None:
    planner, paces = RoundPlanner(ASSUMED), [Pace(Policy("fixed", TreeShape(8, 3, 2), gain=2.0)) for _ in range(2)]
    for accepted in (0, 3, 1):
        paces[0].observe(Verdict("model", accepted, 1.5, 0.3, 1.0))
        assert planner.load(paces, [5, 70], 3) == planner.load(paces, [5, 70], 3)
        assert planner.prompt_tokens([1, 80, 3]) == planner.prompt_tokens([1, 80, 3])


def test_a_pass_without_nodes_is_one_of_plain_decoding() -> None:
    """Rounds of one size are cheaper than those of all sizes: the first node pays for the difference."""
    costs = Costs(
        (100,), (1, 8), (1,), (10.0,), ((10.0, 38.0),), (1.0,), ((1.0,),), (0.0,), 0, 0, 0, (2, 4), (1.1, 1.5)
    )
    paces = [Pace(Policy("lookup")) for _ in range(4)]
    load = RoundPlanner(costs).load(paces, [100] * 4, 0)
    assert load.passes(1) == pytest.approx([15.0, 26.0])
    assert [load.prices.plain_ms(texts) for texts in (1, 2, 3, 4, 6)] == pytest.approx([10, 11, 13, 15, 19])
    assert RoundPlanner(costs).load(paces, [100] * 4, 4).passes(0) == pytest.approx([38.0]), "beside a prompt"
