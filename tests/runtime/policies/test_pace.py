"""Proves what is learnt of a text: by what it accepts and the prices alone; a draft that does not pay rests, is tried
again ever more rarely, and works again where the text has changed; and no question teaches anything.
"""

from __future__ import annotations

import copy
import itertools
import logging

import pytest
from fakes.drafts import FakeDraft, Guess
from hypothesis import given
from hypothesis import strategies as st
from texts.decoding_text import Text, rounds

from dovetail.runtime.decoding.drafting import DraftedTree
from dovetail.runtime.policies.base import OWN_ESTIMATES, Policy, PolicyKind
from dovetail.runtime.policies.costs import ASSUMED, Costs
from dovetail.runtime.policies.pace import Pace, Verdict, speed_gain
from dovetail.runtime.trees.shape import TreeShape

UNMEASURED = Policy("fixed", TreeShape(12, 5, 4), gain=3.0)
ADAPTIVE = Policy("adaptive", TreeShape(32, 8, 4), OWN_ESTIMATES, gain=2.0)


def priced(first_ms: float) -> Costs:
    """A plain round of 10 ms, trees of 8 nodes for nothing, and a draft's call."""
    nodes = (1, 8, 32)
    return Costs(
        (100,), nodes, (1, 8), (10.0,), ((10.0, 10.0, 40.0),), (first_ms,), ((first_ms,) * 2,), (0.0,), 0, 0, 0
    )


def sure(chance: float) -> Guess:
    """Always gives the same, to its first child the `chance`."""
    return lambda text: [(1, chance), (2, (1 - chance) / 2), (3, (1 - chance) / 3), (4, (1 - chance) / 7)]


def text(policy: Policy = UNMEASURED, chance: float = 0.7) -> Text:
    return Text(policy, [9, 8, 7], FakeDraft(sure(chance)))


def asked(made: list[DraftedTree]) -> list[bool]:
    """Of every round, whether the model was."""
    return [tree.source == "model" for tree in made]


def gaps(drafts: list[bool]) -> list[int]:
    """How long each rest was."""
    return [len(list(group)) for drafted, group in itertools.groupby(drafts) if not drafted]


verdicts = st.builds(
    Verdict,
    st.sampled_from(["model", "model", "matches", "none"]),
    st.integers(0, 6),
    st.floats(0, 6),
    st.floats(0, 5),
    st.floats(0.1, 2),
)


def answers(pace: Pace) -> list[float]:
    return [
        pace.trust,
        pace.match_trust,
        pace.is_resting,
        pace.rests,
        pace.model_gain(1.0),
        pace.model_gain(2.5),
        speed_gain([pace]),
        speed_gain([pace, Pace(UNMEASURED)]),
    ]


@given(st.sampled_from(["plain", "lookup", "fixed", "adaptive"]), st.lists(verdicts, max_size=60), st.data())
def test_a_question_changes_nothing(kind: PolicyKind, observed: list[Verdict], data: st.DataObject) -> None:
    """Asked twice or never, a pace learns the same."""
    policy = Policy(kind, TreeShape(8, 3, 2), OWN_ESTIMATES, gain=1.5)
    curious, silent = Pace(policy), Pace(policy)
    for verdict in observed:
        if data.draw(st.booleans()):
            assert answers(curious) == answers(curious)
        curious.observe(verdict)
        silent.observe(verdict)
    assert answers(curious) == answers(silent)


@given(st.lists(verdicts, max_size=60))
def test_what_is_learnt_stays_within_reason(observed: list[Verdict]) -> None:
    pace = Pace(ADAPTIVE)
    for verdict in observed:
        pace.observe(verdict)
        assert pace.trust >= 0
        assert pace.match_trust >= 0
        assert speed_gain([pace]) >= 1


def test_a_policy_that_asks_no_model_never_rests() -> None:
    for kind in ("plain", "lookup"):
        pace = Pace(Policy(kind))
        for _ in range(300):
            pace.observe(Verdict("matches" if kind == "lookup" else "none", 0, 2.0, 3.0, 1.0))
        assert not pace.is_resting
        assert pace.rests == 0


@pytest.mark.parametrize(
    ("policy", "costs"), [(UNMEASURED, ASSUMED), (UNMEASURED, priced(2.0)), (ADAPTIVE, priced(2.0))]
)
def test_a_hopeless_draft_rests_longer_and_longer(policy: Policy, costs: Costs) -> None:
    one = text(policy)
    drafted = asked(rounds(one, costs, 3000, lambda tree: 0))
    assert drafted[0]
    assert drafted.index(False) < 100
    rests = gaps(drafted)[:-1]
    assert rests == sorted(rests)
    assert rests[:2] == [16, 32]
    assert rests[-1] >= 256
    assert one.pace.rests >= len(rests)
    assert sum(drafted[-1500:]) < 60


@pytest.mark.parametrize(
    ("policy", "costs"), [(UNMEASURED, ASSUMED), (UNMEASURED, priced(1.0)), (ADAPTIVE, priced(1.0))]
)
def test_a_draft_that_pays_never_rests(policy: Policy, costs: Costs) -> None:
    one = text(policy)
    assert all(asked(rounds(one, costs, 2000, lambda tree: min(2, tree.count))))
    assert one.pace.rests == 0


def test_after_a_change_of_the_text_it_works_again() -> None:
    one, turn = text(), itertools.count()

    def accept(tree: DraftedTree) -> int:
        return min(3, tree.count) if next(turn) >= 400 else 0

    drafted = asked(rounds(one, ASSUMED, 1500, accept))
    assert sum(drafted[300:400]) < 20
    assert all(drafted[-400:])


def test_a_rest_teaches_nothing_of_the_model() -> None:
    pace = Pace(UNMEASURED)
    while not pace.is_resting:
        pace.observe(Verdict("model", 0, 2.0, 0.4, 1.0))
    before = pace.trust, pace.model_gain(1.0)
    for _ in range(10):
        pace.observe(Verdict("none", 0, 0.0, 0.0, 1.0))
    assert pace.is_resting
    assert (pace.trust, pace.model_gain(1.0)) == before


def test_a_text_learns_the_same_in_any_company() -> None:
    """Two texts' rounds may come in any order: what one has learnt is of its own verdicts."""
    made = [Verdict("model", accepted, 1.5, 0.2, 1.0) for accepted in (0, 3, 1, 0, 2) * 20]
    alone, beside, other = Pace(UNMEASURED), Pace(UNMEASURED), Pace(UNMEASURED)
    for verdict in made:
        alone.observe(verdict)
    for verdict in made:
        other.observe(Verdict("model", 0, 4.0, 3.0, 2.0))
        beside.observe(verdict)
    assert answers(alone) == answers(beside)


def test_trust_is_accepted_over_hoped() -> None:
    for share in (0.25, 0.5, 1.0, 1.5):
        pace = Pace(ADAPTIVE)
        for _ in range(400):
            pace.observe(Verdict("model", 3, 3 / share, 0.0, 1.0))
        assert pace.trust == pytest.approx(share, rel=0.01)
        for _ in range(100):
            pace.observe(Verdict("matches", 3, 3 / share, 0.0, 1.0))
        assert pace.match_trust == pytest.approx(share, rel=0.01)
        assert pace.trust == pytest.approx(share, rel=0.01), "matches say nothing of the model"


def test_matches_get_their_credit_back() -> None:
    pace = Pace(Policy("lookup"))
    for _ in range(20):
        pace.observe(Verdict("matches", 0, 3.0, 0.0, 1.0))
    low = pace.match_trust
    assert low < 0.2
    values = []
    for _ in range(200):
        pace.observe(Verdict("none", 0, 0.0, 0.0, 1.0))
        values.append(pace.match_trust)
    assert values == sorted(values)
    assert values[-1] > 0.85 * Pace(Policy("lookup")).match_trust


def test_speed_is_measured_against_plain_decoding() -> None:
    """Three tokens in the time of one and a half: twice as fast. Of several texts together, the ratio of the sums."""
    fast, plain = Pace(Policy("fixed", gain=1.0)), Pace(Policy("plain"))
    for _ in range(400):
        fast.observe(Verdict("model", 2, 2.0, 0.5, 1.0))
        plain.observe(Verdict("none", 0, 0.0, 0.0, 1.0))
    assert speed_gain([fast]) == pytest.approx(2.0, rel=0.01)
    assert speed_gain([fast, plain]) == pytest.approx((3 + 1) / (1.5 + 1), rel=0.01)
    assert speed_gain([]) == 1.0
    slow = Pace(Policy("fixed", gain=1.0))
    for _ in range(400):
        slow.observe(Verdict("model", 0, 2.0, 3.0, 1.0))
    assert speed_gain([slow]) == 1.0, "plain decoding is to be had"


@pytest.mark.parametrize(("policy", "costs"), [(UNMEASURED, ASSUMED), (UNMEASURED, priced(2.0))])
def test_a_stranger_is_told_of_once(policy: Policy, costs: Costs, caplog: pytest.LogCaptureFixture) -> None:
    rounds(text(policy), costs, 600, lambda tree: 0)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "the target agrees with the draft in" in warning.getMessage()
    assert warning.getMessage().endswith("Was it trained for this target?")


def test_a_draft_that_is_too_dear_is_no_stranger(caplog: pytest.LogCaptureFixture) -> None:
    turn, one = itertools.count(), text()
    rounds(one, priced(8.0), 600, lambda tree: int(next(turn) % 3 == 0))
    assert one.pace.rests > 0
    assert not caplog.records


def test_a_copy_learns_on_its_own() -> None:
    pace = Pace(UNMEASURED)
    other = copy.deepcopy(pace)
    other.observe(Verdict("model", 0, 5.0, 5.0, 1.0))
    assert answers(pace) == answers(Pace(UNMEASURED))
