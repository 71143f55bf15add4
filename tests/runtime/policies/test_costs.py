"""Proves that prices are the measured tables: at every measured point, on the line between two, beyond them on the line
of the last ones, with the host's share in each; and that tables which are none are refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.errors import UserError
from dovetail.runtime.policies.costs import ASSUMED, Costs, PriceList

COSTS = Costs(
    contexts=(100, 500, 900),
    nodes=(1, 4, 8, 16),
    widths=(1, 2, 8),
    plain_ms=(9.0, 10.0, 13.0),
    verify_ms=((10.0, 11.0, 15.0, 30.0), (11.0, 12.0, 16.0, 31.0), (14.0, 15.0, 19.0, 34.0)),
    first_ms=(1.0, 1.5, 2.5),
    level_ms=((0.5, 0.75, 1.0), (0.6, 0.85, 1.1), (0.8, 1.05, 1.3)),
    text_ms=(0.2, 0.3, 0.5),
    host_ms=0.4,
    host_level_ms=0.05,
    host_node_ms=0.01,
)


@given(st.integers(0, 1200), st.integers(1, 16), st.integers(1, 8), st.integers(1, 5))
def test_prices_are_interpolated(context: int, rows: int, width: int, texts: int) -> None:
    def mixed(*by_context: Any) -> float:
        return float(np.interp(context, COSTS.contexts, by_context))

    prices = COSTS.at(context)
    verify = mixed(*(np.interp(rows, COSTS.nodes, row) for row in COSTS.verify_ms)) + 0.01 * rows
    text = (texts - 1) * mixed(*COSTS.text_ms)
    level = mixed(*(np.interp(width, COSTS.widths, row) for row in COSTS.level_ms)) + 0.05
    assert prices.pass_ms(rows, texts) == pytest.approx(verify + text)
    assert prices.level_ms(width) == pytest.approx(level)
    assert prices.plain_ms() == pytest.approx(mixed(*COSTS.plain_ms))
    assert prices.first_ms() == pytest.approx(mixed(*COSTS.first_ms) + 0.4 + 0.05)
    assert prices.plain_ms(texts) - prices.plain_ms() == pytest.approx(prices.pass_ms(texts, texts) - prices.pass_ms(1))
    assert prices.first_ms(texts) - prices.first_ms() == pytest.approx(prices.level_ms(texts) - prices.level_ms(1))


def test_beyond_what_was_measured_the_last_half_goes_on() -> None:
    """From 8 to 16 rows 15 ms: further 8 rows cost as much again."""
    prices = COSTS.at(100)
    step = prices.pass_ms(16) - prices.pass_ms(8)
    assert prices.pass_ms(24) - prices.pass_ms(16) == pytest.approx(step)
    assert prices.pass_ms(400) - prices.pass_ms(392) == pytest.approx(step)
    assert prices.level_ms(12) - prices.level_ms(8) == pytest.approx(prices.level_ms(8) - prices.level_ms(4))
    flat = dataclasses.replace(COSTS, nodes=(1,), verify_ms=((10.0,), (11.0,), (14.0,)))
    assert flat.at(100).pass_ms(7) == flat.at(100).pass_ms(1)


def test_near_contexts_share_their_prices() -> None:
    prices = PriceList(COSTS)
    assert prices.at(130) is prices.at(190)
    for context in (0, 130, 700, 5000):
        near = COSTS.at(context)
        assert prices.at(context).pass_ms(8) == pytest.approx(near.pass_ms(8), rel=0.02)


def test_unmeasured_eight_rows_cost_a_fifth_more_than_one() -> None:
    prices = ASSUMED.at(1000)
    assert [prices.pass_ms(rows) for rows in (1, 8)] == pytest.approx([1.0, 1.2])
    assert prices.pass_ms(9) - prices.pass_ms(8) > prices.pass_ms(8) - prices.pass_ms(7)
    assert [prices.plain_ms(texts) for texts in (1, 8)] == pytest.approx([1.0, 1.2])
    assert prices.switch == 0.1, "another size of the pass, too"
    assert prices.first_ms() == pytest.approx(0.1), "a draft call a tenth of it"
    assert prices.level_ms(8) < 2 * prices.level_ms(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"contexts": ()},
        {"contexts": (100, 100, 900)},
        {"contexts": (0, 500, 900)},
        {"nodes": (2, 4, 8, 16)},
        {"widths": (1, 8, 2)},
        {"plain_ms": (9.0, 10.0)},
        {"plain_ms": (9.0, 10.0, float("nan"))},
        {"first_ms": (1.0, 0.0, 1.0)},
        {"verify_ms": COSTS.verify_ms[:2]},
        {"verify_ms": ((10.0, 11.0, 15.0), *COSTS.verify_ms[1:])},
        {"level_ms": ((0.5, -0.1, 1.0), *COSTS.level_ms[1:])},
        {"text_ms": (0.2, 0.3)},
        {"text_ms": (0.2, 0.3, -0.1)},
        {"text_ms": (0.2, 0.3, float("nan"))},
        {"host_ms": -1.0},
        {"host_level_ms": float("inf")},
        {"host_node_ms": float("nan")},
        {"switch_ms": -0.1},
        {"switch_ms": float("nan")},
    ],
)
def test_what_is_no_table_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"costs.{next(iter(wrong))}: expected"):
        dataclasses.replace(COSTS, **wrong)


@given(st.integers(1, 60))
def test_a_further_row_costs_the_mean_of_the_next_eight(rows: int) -> None:
    """Beyond 16 rows, too, where the last half goes on."""
    prices = COSTS.at(500)
    steps = [prices.pass_ms(row + 1) - prices.pass_ms(row) for row in range(rows, rows + 8)]
    assert prices.row_ms(rows) == pytest.approx(sum(steps) / 8)


def test_another_size_costs_the_same_at_every_context() -> None:
    assert COSTS.at(300).switch == 0.0
    assert {dataclasses.replace(COSTS, switch_ms=0.7).at(context).switch for context in (0, 300, 5000)} == {0.7}


def test_no_cost_of_a_further_text_is_allowed() -> None:
    assert dataclasses.replace(COSTS, text_ms=(0.0,) * 3).at(300).pass_ms(4, 9) == COSTS.at(300).pass_ms(4, 1)
