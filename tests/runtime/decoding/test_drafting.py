"""Proves how a model and matches in the text share the rounds: the better one's candidates are taken, what the model
missed it catches up with, promises that a text breaks are believed less, several texts share what a pass has room for,
and the text stays the target's own.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.drafts import FakeDraft, Guess, Texts, knows, misses
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.numpy_target import NumpyTarget
from texts.decoding_text import Text, round_of, rounds

from dovetail.runtime import load
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.drafts.base import blind
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.drafts.row_pool import RowPool
from dovetail.runtime.errors import DraftError
from dovetail.runtime.pipeline import UNMEASURED_GAIN, Pipeline
from dovetail.runtime.policies.base import OWN_ESTIMATES, Policy
from dovetail.runtime.policies.costs import ASSUMED, Costs
from dovetail.runtime.policies.pace import Pace, Verdict
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Tree

COPY = [*range(20, 60), *range(20, 40)]  # the end has been there before, 20 tokens of it
NEW = list(range(20, 80))
WEAK = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]  # two tokens in common: may be chance
SHAPE = TreeShape(4, 3, 1)
FIXED = Policy("fixed", SHAPE, gain=2.0)
LOOKUP = Policy("lookup", gain=2.0)
SAME: Guess = lambda text: [(len(text) % 3 + 1, 0.9)]  # noqa: E731  # a model that guesses by the length alone


def costs(step_at: int = 24, *, step_ms: float = 100.0, first_ms: float = 10.0) -> Costs:
    """A pass of 10 ms up to `step_at` nodes and `step_ms` more above."""
    passes = tuple(10.0 if n <= step_at else 10.0 + step_ms for n in range(1, 25))
    return Costs((100,), tuple(range(1, 25)), (1,), (10.0,), (passes,), (first_ms,), ((0.1,),), (0.0,), 0, 0, 0)


def text(tokens: list[int], policy: Policy = FIXED, **more: Any) -> Text:
    return Text(policy, tokens, FakeDraft(SAME), looks_up=True, **more)


def verified(one: Text, prices: Costs) -> Tree:
    """What the pass verifies of one text's tree."""
    (drafted,) = round_of([one], prices)
    return drafted.candidates.best(drafted.count)


def asked(one: Text) -> int:
    assert one.model is not None
    return one.model.asked


def test_a_copy_is_taken_and_new_text_is_the_models() -> None:
    one = text(COPY)
    assert verified(one, costs()).tokens.tolist() == [39, *range(40, 60), *range(20, 23)]
    assert asked(one) == 0
    one = text(NEW)
    assert verified(one, costs()).tokens.tolist() == [79, 1, 2, 3]
    assert asked(one) == 1


def test_whoever_drafts_the_tree_both_are_told_of_the_text() -> None:
    one = text(COPY)
    round_of([one], costs())
    one.go_on(range(40, 50))
    round_of([one], costs())
    assert asked(one) == 0
    one.go_on([99, 98])
    assert verified(one, costs()).tokens.tolist()[0] == 98
    assert asked(one) == 1
    assert one.model is not None
    assert one.model.text == [*COPY, *range(40, 50), 99, 98]


def test_where_no_matches_are_wanted_the_model_is_asked() -> None:
    one = Text(FIXED, COPY, FakeDraft(SAME))
    (drafted,) = round_of([one], costs())
    assert (drafted.source, drafted.count, asked(one)) == ("model", 3, 1)


def test_where_nothing_is_wanted_nothing_is_drafted() -> None:
    one = text(COPY, Policy("plain"))
    (drafted,) = round_of([one], costs())
    assert (drafted.source, drafted.count, asked(one)) == ("none", 0, 0)
    assert drafted.candidates.best(0).tokens.tolist() == [39]
    assert drafted.extra_ms == 0


@pytest.mark.parametrize("step_at", [4, 8, 16])
def test_the_curve_decides_how_many_matches(step_at: int) -> None:
    assert len(verified(Text(LOOKUP, COPY, looks_up=True), costs(step_at))) == step_at


def test_a_round_does_not_reach_beyond_its_room() -> None:
    assert verified(text(COPY, room=5), costs()).depths().max() == 4
    assert verified(text(NEW, room=3), costs()).depths().max() == 2
    for tokens in (COPY, NEW):
        one = text(tokens, room=1)
        assert len(verified(one, costs())) == 1
        assert asked(one) == 0


def test_where_siblings_are_forbidden_there_are_chains() -> None:
    """Of the model and of the matches."""
    wide = Policy("fixed", TreeShape(8, 2, 3), gain=2.0)
    fork: Guess = lambda before: [(5, 0.4), (6, 0.3), (7, 0.2)]  # noqa: E731  # typed, in one line
    for tokens in (NEW, [1, 2, 5, 0, 1, 2, 6, 0, 1, 2, 5, 9, 1, 2]):
        one = Text(wide, tokens, FakeDraft(fork), looks_up=True)
        assert not verified(one, costs(first_ms=0.1)).is_chain()
        one.only_chains = True
        assert len(verified(one, costs(first_ms=0.1))) > 1
        assert verified(one, costs(first_ms=0.1)).is_chain()


def accepted_by_the_model(accept_length: int) -> Pace:
    pace = Pace(FIXED)
    for _ in range(20):
        pace.observe(Verdict("model", accept_length, 2.0, 1.0, 0.1))
    return pace


def test_a_model_that_brings_more_is_asked_in_place_of_weak_matches() -> None:
    prices = costs(first_ms=1.0)
    assert round_of([text(WEAK, pace=accepted_by_the_model(3))], prices)[0].source == "model"
    assert round_of([text(WEAK, pace=accepted_by_the_model(0))], prices)[0].source == "matches"
    assert round_of([text(COPY, pace=accepted_by_the_model(3))], prices)[0].source == "matches"


def test_a_model_that_rests_leaves_the_round_to_weak_matches() -> None:
    pace = accepted_by_the_model(3)
    while not pace.is_resting:
        pace.observe(Verdict("model", 0, 2.0, 9.0, 1.0))
    for _ in range(8):
        pace.observe(Verdict("matches", 2, 2.0, 0.0, 0.1))
    assert round_of([text(WEAK, pace=pace)], costs())[0].source == "matches"
    one = text(NEW, pace=pace)
    assert round_of([one], costs())[0].source == "none"
    assert asked(one) == 0


def test_broken_promises_are_believed_less_and_tried_again() -> None:
    one = text(COPY)
    made = rounds(one, costs(first_ms=1.0), 80, lambda tree: 0 if tree.source == "matches" else 2)
    taken = [tree.source == "matches" for tree in made]
    assert taken[0]
    assert not all(taken[:20])
    assert any(taken[40:])
    assert sum(taken[20:]) < 30
    other = text(COPY)
    assert round_of([other], costs(first_ms=1.0))[0].source == "matches", "another text begins afresh"


def test_unmeasured_the_draft_with_more_tokens_is_asked() -> None:
    policy = Policy("fixed", SHAPE, gain=UNMEASURED_GAIN)
    assert round_of([text(COPY, policy)], ASSUMED)[0].source == "matches"
    assert round_of([text([1, 2, 3, 1, 2], policy)], ASSUMED)[0].source == "model"


def test_what_a_tree_is_said_to_cost_is_what_it_adds_to_the_round() -> None:
    """A call that reads 10 ms, two levels of 0.1 ms, and three nodes on a line of 1 ms each."""
    passes = tuple(10.0 + n for n in range(1, 25))
    prices = Costs((100,), tuple(range(1, 25)), (1,), (11.0,), (passes,), (10.0,), ((0.1,),), (0.0,), 0, 0, 0)
    (drafted,) = round_of([Text(FIXED, NEW, FakeDraft(SAME))], prices)
    assert drafted.count == 3
    assert drafted.extra_ms == pytest.approx(10.0 + 2 * 0.1 + 3.0)
    assert drafted.plain_rate == pytest.approx(1 / 11.0)
    assert drafted.hoped == pytest.approx(sum(math.exp(-0.1 * (i + 0.5)) for i in (1, 2, 3)), rel=0.1)
    verdict = drafted.verdict(2)
    assert verdict == Verdict("model", 2, drafted.hoped, drafted.extra_ms, drafted.plain_rate)
    (drafted,) = round_of([Text(LOOKUP, COPY, looks_up=True)], prices)
    assert drafted.extra_ms == pytest.approx(drafted.count), "matches cost their nodes alone"


def test_several_texts_share_what_a_pass_has_room_for() -> None:
    """Eight rows cost what one does: four roots leave four places, for the surest of all."""
    guesses = [0.9, 0.2, 0.05, 0.9]
    texts = [
        Text(Policy("adaptive", SHAPE, OWN_ESTIMATES, gain=2.0), NEW, FakeDraft(lambda before, p=p: [(1, p)]))
        for p in guesses
    ]
    prices = costs(8, first_ms=0.1)
    counts = [drafted.count for drafted in round_of(texts, prices)]
    assert sum(counts) == 4
    assert counts[0] == counts[3] == 2
    alone = [round_of([one], prices)[0].count for one in texts]
    assert (alone[0], alone[3]) == (3, 3), "alone each has room for its tree"


@pytest.mark.parametrize(("first_ms", "step_at", "asked_together"), [(0.1, 8, 2), (60.0, 8, 0), (0.1, 2, 0)])
def test_in_company_a_model_is_asked_where_it_is_expected_to_earn_its_calls(
    first_ms: float, step_at: int, asked_together: int
) -> None:
    """Alone a text finds that out by itself, and rests."""
    texts = [Text(FIXED, NEW, FakeDraft(SAME)) for _ in range(2)]
    round_of(texts, costs(step_at, first_ms=first_ms))
    assert sum(map(asked, texts)) == asked_together
    round_of(texts[:1], costs(step_at, first_ms=first_ms))
    assert sum(map(asked, texts)) == asked_together + 1


@pytest.mark.parametrize("is_wish", [False, True])
def test_in_company_a_fixed_tree_must_earn_its_place_unless_it_was_asked_for(is_wish: bool) -> None:
    policy = dataclasses.replace(FIXED, is_wish=is_wish)
    hopeless: Guess = lambda before: [(1, 0.01)]  # noqa: E731  # typed, in one line
    assert round_of([Text(policy, NEW, FakeDraft(hopeless))], costs(2))[0].count == 3
    made = round_of([Text(policy, NEW, FakeDraft(hopeless)) for _ in range(2)], costs(2))
    assert [drafted.count for drafted in made] == ([3, 3] if is_wish else [0, 0])


# Where every path of a tree is fed from the root.

LINE = Costs((100,), (1, 64), (1,), (11.0,), ((11.0, 74.0),), (0.1,), ((0.1,),), (0.0,), 0, 0, 0)  # 1 ms a row


def adaptive(tree: TreeShape, gain: float) -> Policy:
    return Policy("adaptive", tree, OWN_ESTIMATES, gain=gain)


def rows_of(tree: Tree) -> int:
    """That a pass has of it."""
    return sum(map(len, tree.paths()))


@pytest.mark.parametrize(("gain", "count"), [(1.5, 2), (3.0, 1)])
def test_a_sibling_is_verified_where_it_is_worth_its_whole_path(gain: float, count: int) -> None:
    """It brings 0.4 tokens with two rows of 1 ms, the root's and its own; a plain token takes 11 ms."""
    two: Guess = lambda before: [(1, 0.5), (2, 0.4)]  # noqa: E731  # typed, in one line
    pace = Pace(adaptive(TreeShape(3, 1, 2), gain))
    assert (0.4 * 11 / gain >= 2) == (count == 2)
    planner = RoundPlanner(LINE)
    (drafted,) = round_of([Text(pace.policy, NEW, FakeDraft(two), pace=pace)], LINE, planner=planner)
    assert drafted.kept == [1, 2][:count]
    assert planner.size == rows_of(drafted.tree) == (4 if count == 2 else 2)


def test_what_hangs_on_a_sibling_that_is_not_worth_it_goes_with_it() -> None:
    """The sibling's child is surer than that of the first one, which stays."""
    chances = {(): [(1, 0.62), (2, 0.4)], (1,): [(3, 0.51)], (2,): [(4, 0.9)]}
    guess: Guess = lambda before: chances[tuple(before[len(NEW) :])]  # noqa: E731  # typed, in one line
    policy = adaptive(TreeShape(5, 2, 2), 2.7)
    (whole,) = round_of([Text(policy, NEW, FakeDraft(guess))], LINE)
    assert whole.tree.tokens.tolist() == [79, 1, 2, 3, 4]
    (drafted,) = round_of([Text(policy, NEW, FakeDraft(guess))], LINE, planner=RoundPlanner(LINE))
    assert drafted.tree.tokens.tolist() == [79, 1, 3]
    assert drafted.tree.is_chain()
    assert drafted.hoped == pytest.approx(0.62 + 0.32, rel=0.1)


def test_a_tree_that_somebody_asked_for_is_verified_whatever_its_rows_cost() -> None:
    wide = Policy("fixed", TreeShape(10, 3, 3), is_wish=True)
    hopeless: Guess = lambda before: [(1, 0.03), (2, 0.02), (3, 0.01)]  # noqa: E731  # typed, in one line
    planner = RoundPlanner(LINE)
    (drafted,) = round_of([Text(wide, NEW, FakeDraft(hopeless))], LINE, planner=planner)
    assert drafted.kept == drafted.candidates.ranked[:9]
    assert len(drafted.tree) == 10
    assert planner.size == rows_of(drafted.tree) > 10


@given(
    st.lists(st.integers(0, 2**32), min_size=1, max_size=3),
    st.floats(0, 5),
    st.floats(1, 4),
    st.sampled_from(["fixed", "adaptive", "lookup"]),
    st.booleans(),
)
def test_a_pass_has_room_for_every_path_of_its_trees(
    seeds: list[int], row_ms: float, gain: float, kind: Any, branches_cost: bool
) -> None:
    """Of any trees at any prices, and what is verified is a tree of the surest that were left."""
    prices = dataclasses.replace(LINE, verify_ms=((11.0, 11.0 + 63 * row_ms),))
    policy = Policy(kind, TreeShape(16, 4, 3), OWN_ESTIMATES, gain=gain)

    def guess(seed: int) -> Guess:
        def children(before: list[int]) -> list[tuple[int, float]]:
            shares = np.random.default_rng([seed, *before]).dirichlet([1, 1, 1, 1])[:3]
            return [(token, float(share)) for token, share in enumerate(sorted(shares, reverse=True))]

        return children

    texts = [Text(policy, WEAK, FakeDraft(guess(seed)), looks_up=True) for seed in seeds]
    planner = RoundPlanner(dataclasses.replace(prices, branches_cost=branches_cost))
    made = round_of(texts, prices, planner=planner)
    for drafted in made:
        assert drafted.count == len(drafted.tree) - 1
        scores = [drafted.candidates.scores[drafted.candidates.ranked.index(one)] for one in drafted.kept]
        assert scores == sorted(scores, reverse=True)
    needed = sum(rows_of(one.tree) if branches_cost else len(one.tree) for one in made)
    assert needed <= planner.size <= max(1.25 * needed, needed + 1)


# With a target.


@pytest.fixture(scope="module")
def target() -> NumpyTarget:
    return NumpyTarget.random()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.sampled_from(["knows", "misses", "random"]),
    st.integers(1, 24),
    st.sampled_from([0.01, 1.0, 20.0]),
    st.sampled_from(["lookup", "fixed", "adaptive"]),
    st.integers(1, 3),
)
def test_first_law(
    target: NumpyTarget,
    temperature: float,
    seed: int,
    count: int,
    skill: str,
    step_at: int,
    draft_ms: float,
    kind: Any,
    number: int,
) -> None:
    """With any prices, any draft and any company the tokens are those of plain decoding."""
    rng = np.random.default_rng(seed)
    config = GenerationConfig(temperature=temperature, seed=seed)
    prompts = [rng.integers(0, 6, int(rng.integers(1, 30))).tolist() for _ in range(number)]
    plain = Texts(target, config).make(prompts, count, [None] * number)
    policy = Policy(kind, TreeShape(16, 5, 3), OWN_ESTIMATES, gain=2.0)
    texts = Texts(target, config, policy, costs(step_at, first_ms=draft_ms), looks_up=True)

    def draft(text: list[int]) -> FakeDraft:
        at_random: Guess = lambda before: [(len(before) * 7 % 32, 0.5), (before[-1], 0.4)]  # noqa: E731  # typed, in one line
        return FakeDraft({"knows": knows(text), "misses": misses(text), "random": at_random}[skill])

    made = texts.make(prompts, count, [draft(one.text) for one in plain])
    assert [one.text for one in made] == [one.text for one in plain]
    assert all(len(one.tokens) == count for one in made)
    assert all(one.failure is None for one in made)


# The pipeline.

BIASED: dict[str, Any] = {
    "logit_bias": dict.fromkeys([5, 9, 300, 7], 100.0),
    "ignore_eos": True,
    "max_new_tokens": 60,
}
PROMPT = [5, 9, 300, 7] * 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_the_same_as_without(tiny_artifact: Path, temperature: float) -> None:
    controls = {"temperature": temperature, "seed": 2, **BIASED}
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="none") as pipe:
        expected = pipe.generate(PROMPT, **controls).token_ids
    with load(tiny_artifact, numerics="exact", ctx_size=256, profile=None) as pipe:
        assert pipe.looks_up
        assert pipe.draft is not None
        with pipe.conversation() as conversation:
            done = pipe.stream(PROMPT, conversation=conversation, **controls).finish()
            again = pipe.stream(PROMPT, conversation=conversation, **controls).finish()
            shorter = pipe.stream(PROMPT[:-3], conversation=conversation, **controls).finish()
        assert pipe.generate(PROMPT[:-3], **controls).token_ids == shorter.token_ids
    assert done.token_ids == again.token_ids == expected
    assert done.drafted_tokens > 0


def test_matches_go_on_where_the_model_fails(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    controls = {"temperature": 0.0, **BIASED}
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="none") as pipe:
        expected = pipe.generate(PROMPT, **controls).token_ids

    def broken(*words: object) -> None:
        raise DraftError("broken")

    monkeypatch.setattr(ModelDraft, "tell", broken)
    with load(tiny_artifact, numerics="exact", ctx_size=256, profile=None) as pipe:
        done = pipe.generate(PROMPT, **controls)
    assert done.token_ids == expected
    assert done.drafted_tokens > 0
    assert done.draft_failure == "DraftError: broken"
    assert caplog.text.count("the draft failed") == 1


def test_a_text_without_room_for_the_draft_is_the_same(tiny_artifact: Path) -> None:
    """The draft's rows are taken by the first texts; the others do without until these have ended."""
    prompts = [[5, 9, 300, 7, 11 + number] * 3 for number in range(4)]
    controls: dict[str, Any] = {"temperature": 1.0, "seed": 2, "ignore_eos": True, "max_new_tokens": 24}
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="none") as pipe:
        expected = [done.token_ids for done in pipe.generate(prompts, **controls)]
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="artifact", tree=SHAPE) as pipe:
        assert pipe.draft is not None
        pipe.draft.pool = RowPool(128)
        made = pipe.generate(prompts, **controls)
        assert pipe.draft.pool.num_free == 2
        late = pipe.generate(prompts[3], **controls)
    assert [done.token_ids for done in made] == expected
    assert all(done.draft_failure is None for done in made)
    assert [done.drafted_tokens > 0 for done in made[:2]] == [True, True]
    assert made[3].drafted_tokens < made[0].drafted_tokens
    assert late.drafted_tokens > 0


def test_the_model_alone_is_asked_where_that_is_wanted(tiny_artifact: Path) -> None:
    with load(tiny_artifact, draft="artifact", profile=None, tree=SHAPE) as pipe:
        assert not pipe.looks_up
        assert (pipe.policy(0.0).kind, pipe.policy(0.0).tree, pipe.policy(0.0).is_wish) == ("fixed", SHAPE, True)


def test_an_artifact_without_a_model_decodes_plainly(tiny_artifact: Path) -> None:
    whole = open_artifact(tiny_artifact)
    bare = dataclasses.replace(whole, manifest=dataclasses.replace(whole.manifest, draft=None))
    with Pipeline(bare, EngineConfig(ctx_size=256)) as pipe:
        assert (pipe.draft, pipe.draft_kind, pipe.looks_up) == (None, "none", False)
        assert pipe.generate(PROMPT, temperature=0.0, **BIASED).drafted_tokens == 0


def test_nothing_is_foreseen_where_nothing_is_drawn(tiny_artifact: Path) -> None:
    with load(tiny_artifact, numerics="exact", ctx_size=256, profile=None) as pipe:
        for temperature, sees in ((0.0, False), (1.0, True)):
            stream = pipe.stream(PROMPT, temperature=temperature, max_new_tokens=4)
            assert (stream._sequence.foresight is not blind) == sees
            stream.close()
