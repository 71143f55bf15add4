"""Proves when a pass gets another size: after as many rounds as a change is worth and no sooner, by noise never, and
at a cost that is bounded against whoever knew all gains before; and that there are few sizes for any need.

Letters: a round's gains g(s) of every size s, the price P of a change, k the size that is kept.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.decoding.pass_size import PassSize, sizes

Gains = dict[int, float]
AMOUNTS = st.integers(-40, 40).map(lambda eighths: eighths / 8)  # whose sums are exact
PRICES = st.integers(0, 80).map(lambda eighths: eighths / 8)


def rounds_of(fewest: int, most: int) -> st.SearchStrategy[list[Gains]]:
    """The gains of as many sizes in every round."""
    counts = st.integers(fewest, most)
    return counts.flatmap(
        lambda n: st.lists(st.fixed_dictionaries(dict.fromkeys(range(1, n + 1), AMOUNTS)), min_size=1)
    )


def chosen(rounds: Sequence[Gains], price: float, first: int | None = None) -> list[int]:
    """The size of every round; `first` is kept from before."""
    size = PassSize()
    size.rows = first
    return [size.choose(gains, price) for gains in rounds]


def cost_of(rounds: Sequence[Gains], price: float, made: Sequence[int]) -> float:
    """What the sizes `made` lost against every round's best one, and their changes; the first size is free."""
    lost = sum(max(gains.values()) - gains[size] for gains, size in zip(rounds, made, strict=True))
    return lost + price * sum(a != b for a, b in itertools.pairwise(made))


def least_cost(rounds: Sequence[Gains], price: float) -> float:
    """Of the best sizes for all rounds, known beforehand."""
    costs = dict.fromkeys(rounds[0], 0.0)
    for gains in rounds:
        best = min(costs.values())
        costs = {size: min(before, best + price) + max(gains.values()) - gains[size] for size, before in costs.items()}
    return min(costs.values())


@given(st.integers(1, 40), st.integers(0, 400), st.integers(1, 9), st.integers(1, 9))
def test_a_constant_advantage_is_taken_when_it_has_made_up_for_the_change(
    advantage: int, price: int, kept: int, better: int
) -> None:
    """In the first round in which the sum exceeds the price."""
    if kept == better:
        better = kept + 1
    waits = price // advantage
    made = chosen([{kept: 0.5, better: 0.5 + advantage / 8}] * (waits + 3), price / 8, kept)
    assert made == [kept] * waits + [better] * 3


@given(st.integers(1, 9), PRICES, st.lists(AMOUNTS, min_size=2, max_size=6))
def test_of_several_the_best_is_taken(kept: int, price: float, amounts: list[float]) -> None:
    gains = dict(enumerate(amounts, 1))
    kept = min(kept, len(gains))
    made = chosen([gains] * 1000, price, kept)
    assert gains[made[-1]] == pytest.approx(max(amounts)) or (max(amounts) - gains[kept]) * 1000 <= price
    assert sum(a != b for a, b in itertools.pairwise([kept, *made])) <= 1


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_noise_changes_nothing(seed: int, others: int) -> None:
    """Gains that are as often above as below. That 100 such steps rise by more than 60 from any of their lows, which is
    six standard deviations, happens in less than one of a million walks.
    """
    rng = random.Random(seed)
    rounds = [{1: 0.0, **{size: rng.choice([-1.0, 1.0]) for size in range(2, others + 2)}} for _ in range(100)]
    assert chosen(rounds, 60.0, 1) == [1] * 100


@given(st.lists(st.floats(0, 5), min_size=1, max_size=50), st.floats(0, 10))
def test_what_comes_and_goes_changes_nothing(swings: list[float], price: float) -> None:
    """A gain that never exceeds the price, and is lost again in the next round."""
    rounds = [{1: 0.0, 2: sign * min(swing, price)} for swing in swings for sign in (1, -1)]
    assert set(chosen(rounds, price, 1)) == {1}


@given(rounds_of(1, 5), PRICES)
def test_between_two_changes_no_other_size_would_have_been_worth_one(rounds: list[Gains], price: float) -> None:
    """In any stretch of rounds with the same size, each other one would have brought at most the price more; and the
    round of the change itself is no exception.
    """
    made = chosen(rounds, price)
    begin = 0
    for _, group in itertools.groupby(made):
        end = begin + len([*group])
        first, rest = rounds[begin], rounds[begin + 1 : end]
        for other in rounds[0]:
            assert first[other] - first[made[begin]] <= price
            for low, high in itertools.combinations(range(len(rest) + 1), 2):
                more = sum(gains[other] - gains[made[begin]] for gains in rest[low:high])
                assert more <= price
        begin = end


@given(rounds_of(1, 5), PRICES)
def test_every_change_has_paid_before_it_was_made(rounds: list[Gains], price: float) -> None:
    """Over some of the last rounds with the old size, and that of the change, the new one brings more than it costs."""
    made = chosen(rounds, price)
    begin = 0
    for i, (old, new) in enumerate(itertools.pairwise(made), 1):
        if old == new:
            continue
        more = [sum(gains[new] - gains[old] for gains in rounds[low : i + 1]) for low in range(begin + 1, i + 1)]
        assert max(more) > price
        begin = i


@given(rounds_of(1, 5), PRICES)
def test_against_one_size_for_all_rounds_at_most_three_prices_are_lost_a_change(
    rounds: list[Gains], price: float
) -> None:
    """By the law of the stretches: one price in the round of a change, one in the rounds behind it, and its own. The
    first size is the best of its round, so there it is one.
    """
    made = chosen(rounds, price)
    changes = sum(a != b for a, b in itertools.pairwise(made))
    own = sum(gains[size] for gains, size in zip(rounds, made, strict=True)) - price * changes
    for size in rounds[0]:
        assert own >= sum(gains[size] for gains in rounds) - (1 + 3 * changes) * price


@given(rounds_of(2, 2), PRICES)
def test_of_two_sizes_four_times_the_least_cost_and_two_prices_are_never_exceeded(
    rounds: list[Gains], price: float
) -> None:
    """Let w(s) be the least cost of all rounds so far that ends with size s (the work function of Borodin, Linial and
    Saks 1992). The two never differ by more than P, and when k is chosen, w(k) is not above the other's.

    So while k is kept, w(k) - w(other) is at most what was missed, which is at most P: nothing stops w(k) from rising
    by all that is lost. Call that L, and m <= min(L, P) what was missed before the round of the change. That round
    loses nothing, and w(k) rises by P - m at least. From one change to the next the sum of both w thus rises by at
    least L + P - m >= (L + P) / 2, at a cost of L + P. So the cost is at most twice that sum, which is at most
    2 min(w) + P.
    """
    cost = cost_of(rounds, price, chosen(rounds, price))
    assert cost <= 4 * least_cost(rounds, price) + 2 * price + 1e-9


def test_the_bound_is_no_idle_one() -> None:
    """Where each change is regretted at once, the cost comes near to four times the least one."""
    price, size, rounds = 1.0, PassSize(), list[Gains]()
    made = [size.choose({1: 0.0, 2: 0.0}, price)]
    for _ in range(4000):
        other = 3 - made[-1]
        rounds.append({made[-1]: 0.0, other: 0.01})
        made.append(size.choose(rounds[-1], price))
    ratio = cost_of(rounds, price, made[1:]) / least_cost(rounds, price)
    assert 3.9 < ratio <= 4


@given(rounds_of(2, 5))
def test_where_a_change_costs_nothing_every_round_has_its_best_size(rounds: list[Gains]) -> None:
    assert [gains[size] for gains, size in zip(rounds, chosen(rounds, 0.0), strict=True)] == [
        max(gains.values()) for gains in rounds
    ]


def test_of_equals_the_smallest_is_taken() -> None:
    assert chosen([{3: 1.0, 2: 1.0, 5: 1.0}], 1.0) == [2]
    assert chosen([{3: 1.0, 2: 4.0, 1: 4.0}], 1.0, 3) == [1]


def test_a_size_that_is_too_small_now_is_left_for_the_best() -> None:
    size = PassSize()
    assert size.choose({2: 1.0, 3: 0.0}, 100.0) == 2
    assert size.choose({3: 0.0, 4: 1.0, 5: 0.5}, 100.0) == 4


def test_behind_another_pass_the_best_is_taken_and_nothing_is_remembered() -> None:
    size = PassSize()
    for _ in range(3):
        assert size.choose({1: 1.0, 2: 0.0}, 10.0) == 1
    for _ in range(9):
        assert size.choose({1: 0.0, 2: 1.0}, 10.0) == 1
    size.forget()
    assert size.choose({1: 1.0, 2: 0.0}, 10.0) == 1
    assert [size.choose({1: 0.0, 2: 1.0}, 10.0) for _ in range(12)] == [1] * 10 + [2] * 2


@given(st.integers(1, 300), st.integers(0, 600))
def test_there_are_few_sizes_for_any_need(least: int, extra: int) -> None:
    """They begin with what is needed and reach what may be of use; up to 8 there is each, and behind it four between a
    power of two and the next, so none is a quarter too large.
    """
    most = least + extra
    found = sizes(least, most)
    assert found[0] == least
    assert all(a < b for a, b in itertools.pairwise(found))
    assert found[-1] >= most
    assert len(found) == 1 or found[-2] < most, "none beyond the first that is enough"
    assert len(found) <= 1 + 8 + 4 * math.ceil(math.log2(max(most / max(least, 8), 1)) + 1)
    for need in range(least, most + 1):
        size = min(size for size in found if size >= need)
        assert size == need if need <= 8 else size <= 1.25 * need
    assert set(found[1:]) <= set(sizes(1, 2 * most)), "whatever the least, they are the same ones"
