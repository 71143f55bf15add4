"""Proves that the chosen tree is the best one: against brute force over all small trees, on random chances and random
stepped prices; and that replaying recorded texts gives round for round what decoding them gives.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
from fakes import planted
from hypothesis import given
from hypothesis import strategies as st

from dovetail.calibration.choose import search
from dovetail.calibration.measure import acceptance
from dovetail.calibration.measure.prompts import passages
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.policies.chances import Chances, best_count
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.trees.shape import TreeShape

FREE = planted.PlantedPair(lambda nodes: 0.0, lambda rows: 0.0, looks_up=True)
COSTS = Costs(
    contexts=(64, 256),
    nodes=(1, 2, 4, 8, 12, 16),
    widths=(1, 2, 4),
    plain_ms=(10.0, 12.0),
    verify_ms=((10.0, 10.0, 10.5, 11.0, 14.0, 20.0), (12.0, 12.0, 12.5, 13.0, 16.0, 24.0)),
    first_ms=(1.0, 1.2),
    level_ms=((0.8, 0.9, 1.0), (0.9, 1.0, 1.1)),
    text_ms=(0.0, 0.0),
    host_ms=0.2,
    host_level_ms=0.1,
    host_node_ms=0.01,
)

chances = st.floats(0, 1, allow_subnormal=False)


@st.composite
def stepped(draw: st.DrawFn, count: int) -> list[float]:
    """[count + 1] a price that rises by steps, some of them 0."""
    steps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 3.0]), min_size=count, max_size=count))
    return [0.0, *itertools.accumulate([draw(st.floats(0.5, 5)), *steps[1:]])]


def trees_by_rank(table: list[list[float]], width: int, most: int) -> Iterator[tuple[int, int, float]]:
    """(nodes, depth, expected accept length) of every tree whose nodes are paths of ranks, parents included."""

    def extensions(
        kept: frozenset[tuple[int, ...]], frontier: list[tuple[int, ...]]
    ) -> Iterator[frozenset[tuple[int, ...]]]:
        yield kept
        if len(kept) + 1 == most:
            return
        for i, node in enumerate(frontier):
            below = [(*node, rank) for rank in range(width)] if len(node) < len(table) else []
            yield from extensions(kept | {node}, [*frontier[i + 1 :], *below])

    for kept in extensions(frozenset(), [(rank,) for rank in range(width)]):
        total = 0.0
        for node in kept:
            reach = 1.0
            for depth, rank in enumerate(node):
                reach *= table[depth][rank]
            total += reach
        yield len(kept) + 1, max(map(len, kept), default=0), total


@given(st.data())
def test_the_optimum_by_rank_against_all_trees(data: st.DataObject) -> None:
    ranks, levels, most = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    table = [data.draw(st.lists(chances, min_size=ranks, max_size=ranks)) for _ in range(levels)]
    passes = data.draw(stepped(most))
    level_ms = data.draw(st.lists(st.floats(0.1, 3), min_size=ranks + 1, max_size=ranks + 1))
    plain = passes[1]

    def round_ms(nodes: int, depth: int, width: int) -> float:
        return passes[nodes] + depth * level_ms[width]

    best = 1 / plain
    for width in range(1, ranks + 1):
        for nodes, depth, accepted in trees_by_rank([row[:width] for row in table], width, most):
            if nodes > 1:
                best = max(best, (1 + accepted) / round_ms(nodes, depth, width))
    found = search.best_by_rank(table, round_ms, plain, most, range(1, ranks + 1))
    assert found.tokens_per_ms == pytest.approx(best)
    if found.tree.nodes > 1:
        price = round_ms(found.tree.nodes, found.tree.depth, found.tree.width)
        assert found.tokens_per_ms == pytest.approx((1 + found.accept_length) / price)


@given(st.data())
def test_how_many_nodes_against_every_connected_set(data: st.DataObject) -> None:
    """Nodes of any tree whose chances fall from parent to child: no connected set beats the best first ones."""
    size = data.draw(st.integers(1, 7))
    parents, values = [-1], [1.0]
    for node in range(1, size + 1):
        parents.append(data.draw(st.integers(0, node - 1)))
        values.append(values[parents[node]] * data.draw(chances))
    passes, rate, trust = data.draw(stepped(size + 1)), data.draw(st.floats(0, 1)), data.draw(st.floats(0.2, 3))
    passes = passes[1:]
    best = 0.0
    for count in range(1, size + 1):
        for kept in itertools.combinations(range(1, size + 1), count):
            if all(parents[node] in (0, *kept) for node in kept):
                best = max(best, trust * sum(values[node] for node in kept) - rate * (passes[count] - passes[0]))
    descending = sorted(values[1:], reverse=True)
    count, value = best_count(descending, passes, rate, trust)
    assert value == pytest.approx(best, abs=1e-9)
    assert value == pytest.approx(trust * sum(descending[:count]) - rate * (passes[count] - passes[0]))


@pytest.fixture(scope="module")
def texts() -> list[acceptance.TextRecords]:
    prompts = passages(planted.tokens(200), 4, 30)
    return acceptance.collect(FREE, FREE.texts(prompts, 80, 0.0), positions=280, seconds=0)


ROOM = 64  # tokens that are decoded behind a prompt


def decoded(prompt: list[int], policy: Policy, pair: planted.PlantedPair = FREE) -> list[int]:
    """Accept lengths of real rounds behind the token that comes with the prompt."""
    return [update.accept_length for update in pair.decode(prompt, policy, COSTS, ROOM) if update.nodes]


WIDEST = TreeShape(16, 10, 4)
POLICIES = [
    Policy("fixed", TreeShape(4, 3, 4)),
    Policy("fixed", TreeShape(16, 7, 4)),
    Policy("fixed", TreeShape(2, 1, 1), gain=1.5),
    Policy("adaptive", WIDEST, gain=2.5),
    Policy("lookup"),
    Policy("plain"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=[policy.kind + str(policy.tree.nodes) for policy in POLICIES])
@pytest.mark.parametrize("looks_up", [True, False])
def test_a_replay_is_what_decoding_does(
    texts: list[acceptance.TextRecords], policy: Policy, looks_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FREE, "looks_up", looks_up)
    if not looks_up:
        texts = [
            [dataclasses.replace(record, matches=acceptance.Matched([], [], [], [])) for record in text]
            for text in texts
        ]
    policy = dataclasses.replace(policy, chances=acceptance.chances(texts))
    prompts = passages(planted.tokens(200), 4, 30)
    for prompt, text in zip(prompts, texts, strict=True):
        inside = text[1:ROOM]  # behind the token that comes with the prompt, to where the rounds end
        replayed = search.replay([inside], policy, COSTS)
        real = decoded(prompt, policy)
        assert sum(replayed.accept_lengths.values()) == len(real)
        assert replayed.tokens == sum(real) + len(real)
        assert sorted(replayed.accept_lengths.elements()) == sorted(real)


ENDING = dataclasses.replace(FREE, ends=frozenset({7}))


@pytest.fixture(scope="module")
def ended() -> list[tuple[list[int], acceptance.TextRecords]]:
    """Prompts, and texts behind them that end before there is no more room."""
    prompts = passages(planted.tokens(400), 12, 30)
    texts = zip(prompts, ENDING.texts(prompts, ROOM, 0.0), strict=True)
    found = [(prompt, acceptance.record(ENDING, text)) for prompt, text in texts if text.has_ended]
    return [(prompt, records) for prompt, records in found if len(records) > 5][:4]


@pytest.mark.parametrize("policy", POLICIES, ids=[policy.kind + str(policy.tree.nodes) for policy in POLICIES])
def test_a_replay_ends_where_decoding_does(
    ended: list[tuple[list[int], acceptance.TextRecords]], policy: Policy
) -> None:
    assert len(ended) == 4
    policy = dataclasses.replace(policy, chances=acceptance.chances([records for _, records in ended]))
    for prompt, records in ended:
        replayed = search.replay([records[1:]], policy, COSTS)
        real = decoded(prompt, policy, ENDING)
        assert sorted(replayed.accept_lengths.elements()) == sorted(real)
        assert replayed.tokens == sum(real) + len(real) == len(records) - 1


def test_the_best_of_each_kind_beats_what_it_began_with(texts: list[acceptance.TextRecords]) -> None:
    default = TreeShape(16, 7, 4)
    found = search.candidates(texts, COSTS, width=4, default=default, most_nodes=16)
    fixed, adaptive = found.fixed.replay.tokens_per_second, found.adaptive.replay.tokens_per_second
    begun = search.replay(texts, Policy("fixed", found.by_rank.tree, found.chances), COSTS).tokens_per_second
    assert fixed >= begun
    assert fixed > found.default.replay.tokens_per_second
    assert adaptive > found.plain.replay.tokens_per_second
    for nodes, depth, width in itertools.product((2, 4, 8, 12, 16), (1, 2, 3, 4, 6, 8, 10), (1, 2, 4)):
        tree = TreeShape(nodes, depth, width)
        assert search.replay(texts, Policy("fixed", tree), COSTS).tokens_per_second <= 1.03 * max(fixed, adaptive)


def test_a_dear_draft_leaves_plain_decoding_the_best(texts: list[acceptance.TextRecords]) -> None:
    dear = dataclasses.replace(COSTS, first_ms=(90.0, 90.0), level_ms=((90.0,) * 3, (90.0,) * 3))
    found = search.candidates(texts, dear, width=4, default=TreeShape(16, 7, 4), most_nodes=16)
    plain = found.plain.replay.tokens_per_second
    assert plain > found.fixed.replay.tokens_per_second
    assert plain > found.default.replay.tokens_per_second
    assert found.by_rank.tree.nodes == 1


def test_chances_of_a_planted_draft_are_found(texts: list[acceptance.TextRecords]) -> None:
    found: Chances = acceptance.chances(texts)
    first = found.by_rank[0]
    expected = 0.6 * planted.CONFIDENT + 0.4 * planted.UNSURE
    assert first[0] == pytest.approx(expected, abs=0.12)
    assert first[3] > first[1], "where its first child is wrong, this draft hides the right one at rank 4"
    assert found.by_score[0] > 0.8
    assert 0.2 < found.by_score[9] < 0.6
