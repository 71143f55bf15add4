"""Proves that planted costs are found: of passes, of draft calls, of steps in the curve, and through a neighbour that
slows the machine down half of the time.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence

import pytest
from fakes import planted
from hypothesis import given
from hypothesis import strategies as st

from dovetail.calibration.measure import latency, price_tables
from dovetail.calibration.measure.pair import EngineRounds
from dovetail.runtime.errors import UserError
from dovetail.runtime.policies.costs import Costs

NODES = (1, 2, 4, 8, 12, 16)
SMALL = Costs(
    contexts=(100, 200),
    nodes=(1, 4),
    widths=(1, 2),
    plain_ms=(1.0, 2.0),
    verify_ms=((1.0, 4.0), (2.0, 8.0)),
    first_ms=(0.5, 0.5),
    level_ms=((1.0, 2.0), (1.0, 2.0)),
    text_ms=(0.25, 0.5),
    host_ms=0.1,
    host_level_ms=0.2,
    host_node_ms=0.01,
)


def pass_ms(nodes: int) -> float:
    return 2.0 if nodes <= 8 else 5.0


def measured(pair: planted.PlantedPair, seconds: float = 0.5) -> price_tables.Latency:
    return latency.measure(pair, planted.tokens(64), seconds=seconds, nodes=NODES, contexts=(40, 100))


@pytest.fixture
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    planted.use_own_clock(monkeypatch)


@pytest.mark.usefixtures("own_clock")
def test_planted_costs_are_found() -> None:
    shares: list[float] = []
    pair = planted.PlantedPair(pass_ms, lambda rows: 0.6 + 0.2 * rows)
    found = latency.measure(
        pair, planted.tokens(64), seconds=0.5, nodes=NODES, contexts=(40, 100), progress=shares.append
    )
    prices = found.costs.at(70)
    for nodes in NODES[1:]:
        assert prices.passes[nodes] == pytest.approx(pass_ms(nodes), rel=0.02)
    assert prices.plain == pytest.approx(pass_ms(1), rel=0.02)
    assert prices.passes[12] - prices.passes[8] == pytest.approx(3, rel=0.02)
    assert found.costs.level_ms[0][0] == pytest.approx(0.8, rel=0.02)
    assert found.costs.level_ms[0][-1] == pytest.approx(1.4, rel=0.02)
    assert found.error < 0.01
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.usefixtures("own_clock")
def test_what_a_further_text_adds_is_found() -> None:
    class Shared(planted.PlantedPair):
        """A pass takes 0.4 ms longer for every further text."""

        def rounds(self, prompt: Sequence[int], texts: int, room: int) -> EngineRounds:
            slower = dataclasses.replace(self, pass_ms=lambda rows: pass_ms(rows) + 0.4 * (texts - 1))
            return planted.PlantedPair.rounds(slower, prompt, texts, room)

    found = measured(Shared(pass_ms, lambda rows: 0.6))
    assert found.costs.text_ms == pytest.approx((0.4, 0.4), rel=0.1)
    assert found.costs.nodes[-3:] == (64, 96, 128)
    assert found.costs.at(70).pass_ms(128) == pytest.approx(5, rel=0.1)


@pytest.mark.usefixtures("own_clock")
def test_what_another_number_of_rows_costs_is_found_and_no_part_of_a_pass() -> None:
    pair = planted.PlantedPair(pass_ms, lambda rows: 0.6, switch_ms=4.0)
    costs = measured(pair).costs
    assert costs.switch_ms == pytest.approx(4.0, rel=0.02)
    for nodes in NODES:
        assert costs.at(70).passes[nodes] == pytest.approx(pass_ms(nodes), rel=0.02)
    assert measured(planted.PlantedPair(pass_ms, lambda rows: 0.6)).costs.switch_ms == pytest.approx(0, abs=0.01)


class Disturbed(planted.PlantedPair):
    """Everything takes three times as long in every other half second."""

    def __init__(self) -> None:
        super().__init__(lambda nodes: self.slowness * pass_ms(nodes), lambda rows: self.slowness * 0.6)

    @property
    def slowness(self) -> float:
        return 3.0 if int(2 * time.perf_counter()) % 2 else 1.0


@pytest.mark.usefixtures("own_clock")
def test_a_neighbour_that_comes_and_goes_does_not_bend_the_curve() -> None:
    costs = measured(Disturbed(), seconds=4).costs
    for row in costs.verify_ms:
        assert row[-1] / row[2] == pytest.approx(2.5, rel=0.1)
        assert row[3] / row[1] == pytest.approx(1.0, rel=0.1)
    assert costs.plain_ms[0] / costs.verify_ms[0][1] == pytest.approx(1.0, rel=0.1)


@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 9)), min_size=1, max_size=12))
def test_rising_is_the_nearest_curve_that_never_falls(points: list[tuple[float, int]]) -> None:
    values, weights = [float(value) for value, _ in points], [weight for _, weight in points]
    fitted = price_tables.rising(values, weights)
    assert list(fitted) == sorted(fitted)

    def distance(curve: list[float]) -> float:
        return sum(w * (a - b) ** 2 for a, b, w in zip(curve, values, weights, strict=True))

    best, rng = distance(list(fitted)), random.Random(0)
    for _ in range(20):  # other curves that never fall are no nearer
        noise = sorted(rng.gauss(0, 5) for _ in values)
        for other in ([a + b for a, b in zip(fitted, noise, strict=True)], sorted(values)):
            assert distance(list(other)) >= best - 1e-6 * (1 + best)


@pytest.mark.parametrize("width", [1, 3, 10])
def test_every_shape_can_have_its_nodes(width: int) -> None:
    for shape in latency.shapes_for(latency.NODES, width):
        candidates = shape.width + (shape.depth - 1) * shape.width**2
        assert candidates >= shape.nodes - 1
        assert shape.width <= width
    assert {shape.nodes for shape in latency.shapes_for(latency.NODES, width)} == set(latency.NODES[1:])


def test_contexts_leave_room() -> None:
    assert latency.contexts_for(1 << 17) == latency.CONTEXTS
    assert latency.contexts_for(2048) == (64, 256, 1024, 2048 - latency.ROOM - 1)
    assert latency.contexts_for(300) == (64, 107)
    with pytest.raises(UserError, match="expected a context of at least"):
        latency.contexts_for(100)


@pytest.mark.usefixtures("own_clock")
def test_threads_are_changed_only_for_a_clear_gain() -> None:
    by_count = {
        4: planted.PlantedPair(lambda nodes: 3.0, lambda rows: 1.0),
        2: planted.PlantedPair(lambda nodes: 2.9, lambda rows: 0.4),
    }
    (target, draft), found = latency.fastest_threads(
        lambda count: planted.opening(by_count[count]), [4, 2], seconds=0.2
    )
    assert (target, draft) == (4, 2)
    assert set(found) == {4, 2}


def test_prices_between_and_outside_the_measured_points() -> None:
    costs = SMALL
    middle = costs.at(150)
    assert middle.passes == pytest.approx((0, 1.5 + 0.01, 3 + 0.02, 4.5 + 0.03, 6 + 0.04))
    assert middle.plain == middle.plain_ms() == 1.5
    assert middle.pass_ms(3) == pytest.approx(4.53)
    assert middle.pass_ms(3, texts=3) == pytest.approx(4.53 + 2 * 0.375)
    assert middle.pass_ms(8) == pytest.approx(middle.passes[4] + 4 * 1.51), "on the line of the last rows"
    assert middle.first_ms() == pytest.approx(0.5 + 0.1 + 0.2)
    assert middle.level_ms(2) == pytest.approx(2 + 0.2)
    assert middle.plain_ms(texts=2) == pytest.approx(middle.pass_ms(2, texts=2) - middle.passes[1] + 1.5)
    assert costs.at(5) == costs.at(100)
    assert costs.at(5000) == costs.at(200)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("contexts", (200, 100)),
        ("nodes", (2, 4)),
        ("widths", ()),
        ("plain_ms", (1.0,)),
        ("verify_ms", ((1.0, 4.0), (2.0,))),
        ("first_ms", (0.5, -1.0)),
        ("level_ms", ((1.0, float("inf")), (1.0, 2.0))),
        ("text_ms", (0.5,)),
        ("host_ms", -0.1),
    ],
)
def test_costs_that_can_not_be_are_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"costs.{field}: expected"):
        dataclasses.replace(SMALL, **{field: value})  # type: ignore[arg-type]  # wrong on purpose
