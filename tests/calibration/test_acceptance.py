"""Proves that acceptance is counted as it happens: on records made by hand and on texts whose draft is known; and that
a text too short gets one clear line.
"""

from __future__ import annotations

import numpy as np
import pytest
from fakes import planted

from dovetail.calibration.measure import acceptance
from dovetail.calibration.measure.acceptance import MAX_DEPTH, Matched, Record
from dovetail.runtime.drafts.graph_contract import Children
from dovetail.runtime.errors import UserError
from dovetail.runtime.policies.chances import SCORE_STEP

PAIR = planted.PlantedPair(lambda nodes: 0.0, lambda rows: 0.0)


def hand_made(path: list[int]) -> Record:
    """A root, its children 1 and 2, and the children 3 and 4 of node 1."""
    return Record(
        parents=[-1, 0, 0, 1, 1],
        scores=[0.0, -0.05, -3.0, -0.15, -4.0],
        depths=[0, 1, 1, 2, 2],
        path=path,
        children={0: [1, 2], 1: [3, 4]},
        context=10,
        matches=Matched([], [], [], []),
    )


def test_shares_by_rank_on_hand_made_records() -> None:
    # At depth 1 the first child is right 6 times of 10, the second 3 times. Below the first: 4 and 1 of 6.
    found = [hand_made(path) for path in [[1, 3]] * 4 + [[1, 4]] + [[1]] + [[2]] * 3 + [[]]]
    rows = acceptance.by_rank([found[:5], found[5:]])
    assert rows[0] == (0.6, 0.3)
    prior = acceptance._PRIOR  # of the depth above, for every depth behind the first
    assert rows[1] == pytest.approx(((4 + prior * 0.6) / (6 + prior), (1 + prior * 0.3) / (6 + prior)))
    assert len(rows) == 2


def test_chances_by_score_on_hand_made_records() -> None:
    texts = [[hand_made([1, 3])] * 300 + [hand_made([])] * 100]
    curve = acceptance.by_score(texts)
    assert list(curve) == sorted(curve, reverse=True)
    assert curve[0] == pytest.approx(0.75, abs=0.02)
    assert curve[1] == pytest.approx(0.75, abs=0.02)
    assert curve[int(3.0 / SCORE_STEP)] < 0.01
    at_depth_2 = acceptance.by_score(texts, depth=2)
    assert at_depth_2[1] == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_record_holds_what_the_draft_offered_and_the_text_took(temperature: float) -> None:
    (text,), (again,) = (PAIR.texts([planted.tokens(20)], 40, temperature) for _ in range(2))
    records = acceptance.record(PAIR, text)
    assert len(records) == 40 - MAX_DEPTH + 1
    for number, found in enumerate(records):
        begin = 20 + number
        assert found.context == begin - 1
        so_far, parent = text.tokens[:begin].tolist(), 0
        for depth in range(len(found.path) + 1):
            guesses = PAIR.children(so_far)
            children = Children(
                np.array([[token for token, _ in guesses]], np.int32),
                np.log(np.array([[chance for _, chance in guesses]], np.float32)),
            )
            path = text.tokens[begin : begin + depth].tolist()
            offered = children.best(len(guesses), [path], again.sampler.foresee)[0][0]
            following = int(text.tokens[begin + depth]) if begin + depth < len(text.tokens) else None
            if depth < len(found.path):
                siblings = found.children[parent]
                assert offered[siblings.index(found.path[depth])] == following
                parent = found.path[depth]
                so_far.append(int(text.tokens[begin + depth]))
            elif parent in found.children:
                assert depth == MAX_DEPTH or following not in offered
        for node in range(1, len(found.parents)):
            assert found.scores[node] <= found.scores[found.parents[node]]
            assert found.depths[node] == found.depths[found.parents[node]] + 1
        again.sampler.follow(int(text.tokens[begin]))


def test_passages_are_spread_over_the_text() -> None:
    found = acceptance.passages(list(range(1000)), 5, 100)
    assert [len(one) for one in found] == [100] * 5
    assert found[0][0] == 0
    assert found[-1][-1] == 999
    assert acceptance.passages(list(range(100)), 1, 100) == [list(range(100))]


def test_a_text_too_short_says_how_much_is_needed() -> None:
    with pytest.raises(UserError, match=r"expected at least 500 tokens \(5 passages of 100\).*got 37") as caught:
        acceptance.passages(list(range(37)), 5, 100)
    assert "\n" not in str(caught.value)
