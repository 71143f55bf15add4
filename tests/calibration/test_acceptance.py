"""Proves that acceptance is counted as it happens: on records made by hand and on texts whose draft is known, up to
where these end; and that texts too short get one clear line.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fakes import planted

from dovetail.calibration.measure import acceptance
from dovetail.calibration.measure.acceptance import MAX_DEPTH, Matched, Record
from dovetail.calibration.measure.pair import Text
from dovetail.calibration.measure.prompts import passages
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
        is_end=False,
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


def texts_of(length: int, ends: frozenset[int] = frozenset(), prompts: int = 1) -> list[Text]:
    pair = dataclasses.replace(PAIR, ends=ends)
    return list(pair.texts(passages(planted.tokens(20 * prompts), prompts, 20), length, 0.0))


def test_a_text_is_recorded_to_its_end() -> None:
    """Beside the same text that goes on: nothing is accepted from the end token on, and nothing else changes."""
    (going,) = texts_of(60)
    end = int(going.tokens[20 + 24])
    (ended,) = texts_of(60, frozenset({end}))
    length = len(ended.tokens) - 20
    assert 12 < length < 60 - MAX_DEPTH, "else this text shows nothing"
    whole, records = acceptance.record(PAIR, going), acceptance.record(PAIR, ended)
    assert len(records) == length
    assert [found.is_end for found in records] == [False] * (length - 1) + [True]
    for left, (found, beyond) in enumerate(zip(reversed(records), reversed(whole[:length]), strict=True)):
        assert (found.parents, found.scores) == (beyond.parents, beyond.scores)
        assert found.path == beyond.path[:left]
    assert any(len(beyond.path) > left for left, beyond in enumerate(reversed(whole[:length]))), "something was cut"
    assert not any(found.is_end for found in whole)


def test_texts_that_end_at_once_are_too_few_to_estimate_from() -> None:
    texts = texts_of(60, frozenset(range(planted.VOCAB)), 3)
    assert [(text.has_ended, len(text.tokens)) for text in texts] == [(True, 21)] * 3
    expected = r"expected texts of at least 50 tokens in all .* got 3 behind 3 prompts.*\(`prompts`\)"
    with pytest.raises(UserError, match=expected):
        acceptance.collect(PAIR, texts, positions=100, seconds=0)
