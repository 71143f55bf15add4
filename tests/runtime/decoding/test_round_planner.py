"""Proves how a pass is filled: prompts share what is read beside the texts that decode; of all texts' candidates those
are verified that no other choice would beat, by trying all; and its size changes where that pays.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.runtime.decoding.pass_size import sizes
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

readable = st.lists(st.one_of(st.just(0), st.just(1), st.integers(1, 5), st.integers(1, 1000)), min_size=1, max_size=20)


@given(readable)
def test_prompts_share_what_a_pass_reads(counts: list[int]) -> None:
    """First come, first served; a text that decodes reads nothing, and the others read less beside it."""
    shares = RoundPlanner(ASSUMED).prompt_tokens(counts)
    budget = PROMPT_TOKENS_BESIDE if 0 in counts else PROMPT_TOKENS
    assert len(shares) == len(counts)
    for i in range(len(counts) + 1):
        assert sum(shares[:i]) == min(sum(counts[:i]), budget)
    assert all(0 <= share <= count for count, share in zip(counts, shares, strict=True))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 4))
def test_every_prompt_is_read_in_as_few_passes_as_there_can_be(counts: list[int], decoding: int) -> None:
    planner, left, passes = RoundPlanner(ASSUMED), list(counts), 0
    budget = PROMPT_TOKENS_BESIDE if decoding else PROMPT_TOKENS
    while left:
        shares = planner.prompt_tokens([0] * decoding + left)
        assert shares[:decoding] == [0] * decoding
        left = [count - share for count, share in zip(left, shares[decoding:], strict=True) if count > share]
        passes += 1
    assert passes == -(-sum(counts) // budget)


CHANCES = st.lists(st.sampled_from([0.9, 0.75, 0.5, 0.3, 0.1, 0.05, 0.0]), max_size=4)


@st.composite
def offers(draw: st.DrawFn, most_rows: int = 1) -> list[Offer]:
    """Of one to three texts, each candidate of at most so many rows."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        chances = sorted(draw(CHANCES), reverse=True)
        rows = [draw(st.integers(1, most_rows)) for _ in chances]
        made.append(Offer(chances, rows, draw(st.sampled_from([False, False, True]))))
    return made


def ways(given_offers: list[Offer]) -> list[tuple[int, ...]]:
    """All ways to take so many of each text's best."""
    return [
        *itertools.product(
            *(range(len(one.chances) if one.is_fixed else 0, len(one.chances) + 1) for one in given_offers)
        )
    ]


def rows_of(given_offers: list[Offer], counts: Sequence[int]) -> int:
    """Of a pass that has so many candidates of each text, roots included."""
    return sum(1 + sum(one.rows[:count]) for one, count in zip(given_offers, counts, strict=True))


def gained(load: PassLoad, given_offers: list[Offer], counts: Sequence[int], allowed: list[int]) -> float:
    """In tokens, by a pass of the smallest of the `allowed` sizes that is large enough."""
    tokens = sum(sum(one.chances[:count]) for one, count in zip(given_offers, counts, strict=True))
    size = min(size for size in allowed if size >= rows_of(given_offers, counts))
    return tokens - load.rate * load.pass_ms(size)


def allowed_sizes(given_offers: list[Offer], kept: int | None) -> list[int]:
    """Of a pass with these, behind one of `kept` rows."""
    least, most = (rows_of(given_offers, counts) for counts in (ways(given_offers)[0], ways(given_offers)[-1]))
    return sizes(least, most) + ([kept] if kept is not None and kept > least else [])


def load_of(given_offers: list[Offer], steps: list[float], prompt: int, gain: float, switch: float = 0.0) -> PassLoad:
    """By prices that rise by these `steps`."""
    passes = (0.0, *itertools.accumulate(steps, initial=5.0))
    prices = Prices(plain=6.0, passes=passes, text=0.3, first=1.0, levels=(0.0, 1.0), switch=switch)
    return PassLoad(prices, len(given_offers), rows=prompt + len(given_offers), gain=gain)


STEPS = st.lists(st.floats(0, 3), min_size=24, max_size=24)


@settings(max_examples=300)
@given(st.lists(offers(), min_size=1, max_size=3), STEPS, st.integers(0, 3), st.floats(0.5, 4))
def test_no_other_choice_gains_more(passes: list[list[Offer]], steps: list[float], prompt: int, gain: float) -> None:
    """Against every way to take so many of each text's best, where a change of the size costs nothing."""
    planner, kept = RoundPlanner(ASSUMED), None
    for given_offers in passes:
        load, allowed = load_of(given_offers, steps, prompt, gain), allowed_sizes(given_offers, kept)
        chosen = planner.choose(load, given_offers)
        assert tuple(chosen.counts) in ways(given_offers)
        assert planner.size in allowed
        assert planner.size >= rows_of(given_offers, chosen.counts)
        assert chosen.ms == load.pass_ms(planner.size)
        best = max(gained(load, given_offers, counts, allowed) for counts in ways(given_offers))
        assert gained(load, given_offers, chosen.counts, allowed) == pytest.approx(best, abs=1e-9)
        kept = planner.size


@settings(max_examples=300)
@given(st.lists(offers(most_rows=5), min_size=1, max_size=3), STEPS, st.floats(0.5, 4))
def test_of_candidates_of_several_rows_no_other_number_gains_more(
    passes: list[list[Offer]], steps: list[float], gain: float
) -> None:
    """Against taking any number of the surest of all texts."""
    planner, kept = RoundPlanner(ASSUMED), None
    for given_offers in passes:
        load, allowed = load_of(given_offers, steps, 0, gain), allowed_sizes(given_offers, kept)
        chosen = planner.choose(load, given_offers).counts
        surest = ways(given_offers)[:1]
        free = [(chance, i) for i, one in enumerate(given_offers) if not one.is_fixed for chance in one.chances]
        for _, text in sorted(free, key=lambda pair: -pair[0]):
            surest.append(tuple(count + (i == text) for i, count in enumerate(surest[-1])))
        assert tuple(chosen) in surest
        assert planner.size >= rows_of(given_offers, chosen)
        best = max(gained(load, given_offers, counts, allowed) for counts in surest)
        assert gained(load, given_offers, chosen, allowed) == pytest.approx(best, abs=1e-9)
        kept = planner.size


STAIRS = Costs((100,), (1, 8, 9, 64), (1,), (10.0,), ((10.0, 10.0, 30.0, 30.0),), (1.0,), ((1.0,),), (0.0,), 0, 0, 0)


def test_a_step_of_the_curve_is_shared_by_who_makes_most_of_it() -> None:
    """Eight rows cost what one does: three roots leave five places."""
    load = RoundPlanner(STAIRS).load([Pace(Policy("plain"))] * 3, [100, 100, 100], 0)
    every = [Offer(chances, [1] * 3) for chances in ([0.9, 0.8, 0.7], [0.05] * 3, [0.6, 0.5, 0.01])]
    assert RoundPlanner(STAIRS).choose(load, every).counts == [3, 0, 2]


LINE = dataclasses.replace(
    STAIRS, nodes=(1, 64), plain_ms=(11.0,), verify_ms=((11.0, 74.0),), switch_ms=10.0
)  # 1 ms a row


def pass_of(planner: RoundPlanner, chances: list[float], *, prompt: int = 0) -> tuple[int, int, float]:
    """Verified nodes of one text that gets them for these, the size of the pass, and what it costs."""
    load = planner.load([Pace(Policy("lookup"))], [100], prompt)
    filling = planner.choose(load, [Offer(chances, [1] * len(chances))])
    return filling.counts[0], planner.size, filling.ms


def test_a_smaller_pass_comes_when_the_rows_that_nobody_needs_have_cost_a_change() -> None:
    """Four of 1 ms each round; a change costs 10 ms."""
    planner = RoundPlanner(LINE)
    assert pass_of(planner, [0.9] * 4) == (4, 5, 15.0 + 10.0)
    assert pass_of(planner, [0.9] * 4) == (4, 5, 15.0)
    assert [pass_of(planner, []) for _ in range(4)] == [(0, 5, 15.0)] * 2 + [(0, 1, 11.0 + 10.0), (0, 1, 11.0)]


def test_a_larger_pass_comes_when_what_it_would_have_brought_is_worth_a_change() -> None:
    """At 1/11 token a millisecond a change costs 0.91 tokens. Four nodes bring 1.2 a round, and their rows cost 0.36 of
    that: what is left has made up for the change in the second round.
    """
    planner = RoundPlanner(LINE)
    assert pass_of(planner, [])[:2] == (0, 1)
    assert [pass_of(planner, [0.3] * 4)[:2] for _ in range(3)] == [(0, 1), (4, 5), (4, 5)]


def test_what_a_pass_has_room_for_is_taken_however_little_it_promises() -> None:
    planner = RoundPlanner(LINE)
    pass_of(planner, [0.9] * 4)
    assert pass_of(planner, [0.001] * 9) == (4, 5, 15.0)


def test_behind_another_prompt_every_size_is_new() -> None:
    """A pass that reads a prompt has another number of rows in any case."""
    planner = RoundPlanner(LINE)
    pass_of(planner, [0.9] * 4)
    assert pass_of(planner, [], prompt=3) == (0, 1, 11.0 + 3.0 + 10.0)
    assert pass_of(planner, [], prompt=3) == (0, 1, 11.0 + 3.0)
    assert pass_of(planner, [0.9] * 4) == (4, 5, 15.0 + 10.0)


def test_rows_that_a_pass_has_in_any_case_cost_nothing_more() -> None:
    planner = RoundPlanner(LINE)
    pass_of(planner, [0.9] * 4)
    assert planner.load([Pace(Policy("lookup"))], [100], 0).passes(6) == [15.0] * 5 + [16.0, 17.0]


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
        assert planner.prompt_tokens([0, 80, 3]) == planner.prompt_tokens([0, 80, 3])


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
