"""Proves how a model and matches in the text share the rounds: the better one draws the tree, what one missed it
catches up with, promises that a text breaks are believed less, and the text stays the target's own.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from dovetail.runtime.drafts.lookup_or_model import MixedDraft
from dovetail.runtime.policies.lookup_or_model import MatchGrowth, MixedPolicy, unmeasured
from fakes import D, chain

from dovetail.runtime import load
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.drafts.base import Foresight, NoDraft, blind
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.errors import DraftError
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.policies.base import NO_GROWTH, PLAIN, FixedGrowth, FixedPolicy, Growth
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, root_only

COPY = [*range(20, 60), *range(20, 40)]  # the end has been there before, 20 tokens of it
NEW = list(range(20, 80))
SHAPE = TreeShape(4, 3, 1)


class Spy:
    """A model that always guesses the same, and keeps what it was told."""

    native_s = 1.0
    bytes_in, bytes_out = 2, 3

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.pairs = 0
        self.asked = 0

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        self.tokens += tokens.tolist()
        self.pairs += len(features)
        if not growth.goes_on(0, [0.0]):
            return root_only(int(tokens[-1]))
        self.asked += 1
        for depth in range(1, 4):
            growth.goes_on(depth, [-0.1 * depth])
        growth.drafted([-0.1, -0.2, -0.3])
        return chain(int(tokens[-1]), [1, 2, 3])


def costs(step_at: int = 24, *, step_ms: float = 100.0, first_ms: float = 10.0) -> Costs:
    """A pass of 10 ms up to `step_at` nodes and `step_ms` more above."""
    passes = tuple(10.0 if n <= step_at else 10.0 + step_ms for n in range(1, 25))
    return Costs((100,), tuple(range(1, 25)), (1,), (10.0,), (passes,), (first_ms,), ((0.1,),), 0, 0, 0)


def growth(policy: MixedPolicy, text: list[int], room: int = 100) -> tuple[Tree, Spy]:
    """One round behind `text`, with fresh drafts."""
    spy = Spy()
    mixed = MixedDraft(spy, LookupDraft())
    features = np.zeros((len(text) - 1, D), np.float32)
    return mixed.propose(np.array(text), features, policy.growth(room, len(text))), spy


def test_a_copy_is_taken_and_new_text_is_the_models() -> None:
    policy = MixedPolicy(FixedPolicy(SHAPE), costs(), rate=0.2)
    tree, spy = growth(policy, COPY)
    assert tree.tokens.tolist() == [39, *range(40, 60), *range(20, 23)]
    assert spy.asked == 0
    tree, spy = growth(policy, NEW)
    assert tree.tokens.tolist() == [79, 1, 2, 3]
    assert spy.asked == 1


def test_whoever_draws_the_tree_both_read_the_text() -> None:
    spy = Spy()
    mixed = MixedDraft(spy, LookupDraft())
    policy = MixedPolicy(FixedPolicy(SHAPE), costs(), rate=0.2)
    text = [*COPY, *range(40, 50), 99, 98]
    begin = 0
    for end in (len(COPY), len(COPY) + 10, len(text)):
        part = text[begin:end]
        features = np.zeros((len(part) - (begin == 0), D), np.float32)
        tree = mixed.propose(np.array(part), features, policy.growth(100, end))
        begin = end
    assert (spy.tokens, spy.pairs, spy.asked) == (text, len(text) - 1, 1)
    assert tree.tokens.tolist() == [98, 1, 2, 3]
    assert (mixed.native_s, mixed.bytes_in, mixed.bytes_out) == (1.0, 2, 3)


def test_where_no_matches_are_wanted_the_model_is_asked() -> None:
    for wanted in (FixedGrowth(SHAPE), NO_GROWTH):
        spy = Spy()
        tree = MixedDraft(spy, LookupDraft()).propose(np.array(COPY), np.zeros((len(COPY) - 1, D), np.float32), wanted)
        assert len(tree) == (4 if wanted is not NO_GROWTH else 1)


@pytest.mark.parametrize("step_at", [4, 8, 16])
def test_the_curve_decides_how_many_matches(step_at: int) -> None:
    tree, _ = growth(MixedPolicy(FixedPolicy(PLAIN), costs(step_at), rate=0.2), COPY)
    assert len(tree) == step_at


def test_a_round_does_not_reach_beyond_its_room() -> None:
    policy = MixedPolicy(FixedPolicy(SHAPE), costs(), rate=0.2)
    assert growth(policy, COPY, room=5)[0].depths().max() == 4
    tree, spy = growth(MixedPolicy(FixedPolicy(PLAIN), costs(), rate=0.2), COPY, room=1)
    assert len(tree) == 1
    assert spy.asked == 0


WEAK = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]  # two tokens in common: may be chance


def test_a_model_that_brings_more_is_asked_in_place_of_weak_matches() -> None:
    def first_token(accept_length: int, rounds: int = 20) -> int:
        policy = MixedPolicy(FixedPolicy(SHAPE), costs(first_ms=1.0), rate=0.2)
        for _ in range(rounds):
            growth(policy, NEW)
            policy.observe(accept_length)
        return int(growth(policy, WEAK)[0].tokens[1])

    assert first_token(accept_length=3) == 1  # the model's
    assert first_token(accept_length=0) == 3  # the match's


def test_broken_promises_are_believed_less_and_tried_again() -> None:
    policy = MixedPolicy(FixedPolicy(SHAPE), costs(first_ms=1.0), rate=0.2)
    taken = []
    for _ in range(80):
        _, spy = growth(policy, COPY)
        taken.append(spy.asked == 0)
        policy.observe(0 if taken[-1] else 2)
    assert taken[0]
    assert not all(taken[:20])
    assert any(taken[40:])
    assert sum(taken[20:]) < 30
    policy.begin()
    assert growth(policy, COPY)[1].asked == 0, "another text begins afresh"


@pytest.mark.parametrize(("trust", "worth", "kept"), [(1.0, 0.0, 3), (0.2, 0.0, 0), (1.0, 1.5, 0), (2.0, 1.5, 3)])
def test_matches_are_kept_if_what_is_believed_of_them_beats_the_model(trust: float, worth: float, kept: int) -> None:
    scores = [math.log(chance) for chance in (0.9, 0.8, 0.7)]
    matches = MatchGrowth(8, [0.0, 10.0, 11.0, 12.0, 13.0], rate=0.15, trust=trust, worth=worth)
    assert matches.drafted(scores) == matches.count == kept
    assert matches.promised == pytest.approx(2.4 if kept else 0.0)


def test_unmeasured_the_draft_with_more_tokens_is_asked() -> None:
    policy = unmeasured(FixedPolicy(SHAPE))
    assert growth(policy, COPY)[1].asked == 0
    assert growth(policy, [1, 2, 3, 1, 2])[1].asked == 1


# The pipeline.

BIASED = {"logit_bias": dict.fromkeys([5, 9, 300, 7], 100.0), "ignore_eos": True, "max_new_tokens": 60}
PROMPT = [5, 9, 300, 7] * 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_the_same_as_without(tiny_artifact: Path, temperature: float) -> None:
    settings = {"temperature": temperature, "seed": 2, **BIASED}
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="none") as pipe:
        expected = pipe.generate(PROMPT, **settings).token_ids
    with load(tiny_artifact, numerics="exact", ctx_size=256, profile=None) as pipe:
        assert pipe.mixes
        with pipe.conversation() as conversation:
            done = pipe.stream(PROMPT, conversation=conversation, **settings).finish()
            again = pipe.stream(PROMPT, conversation=conversation, **settings).finish()
            shorter = pipe.stream(PROMPT[:-3], conversation=conversation, **settings).finish()
        assert pipe.generate(PROMPT[:-3], **settings).token_ids == shorter.token_ids
    assert done.token_ids == again.token_ids == expected
    assert done.drafted_tokens > 0


def test_matches_go_on_where_the_model_fails(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    settings = {"temperature": 0.0, **BIASED}
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="none") as pipe:
        expected = pipe.generate(PROMPT, **settings).token_ids

    class Failing(NoDraft):
        known = 0

        def propose(self, *words: object) -> Tree:
            raise DraftError("broken")

        def truncate(self, known: int) -> None:
            assert known == 0

    with load(tiny_artifact, numerics="exact", ctx_size=256, profile=None) as pipe:
        monkeypatch.setattr(pipe, "_draft_of_a_text", Failing)
        done = pipe.generate(PROMPT, **settings)
    assert done.token_ids == expected
    assert done.drafted_tokens > 0
    assert done.draft_failure == "DraftError: broken"
    assert sum(line.startswith("the draft failed") for line in told.messages) == 1


def test_the_model_alone_is_asked_where_that_is_wanted(tiny_artifact: Path) -> None:
    with load(tiny_artifact, draft="artifact", profile=None, tree=SHAPE) as pipe:
        assert not pipe.mixes
        assert pipe.policy == FixedPolicy(SHAPE)


def test_an_artifact_without_a_model_decodes_plainly(tiny_artifact: Path) -> None:
    whole = open_artifact(tiny_artifact)
    bare = dataclasses.replace(whole, manifest=dataclasses.replace(whole.manifest, draft=None))
    with Pipeline(bare, EngineConfig(ctx_size=256)) as pipe:
        assert (pipe.draft, pipe.draft_kind, pipe.mixes) == (None, "none", False)
        assert pipe.generate(PROMPT, temperature=0.0, **BIASED).drafted_tokens == 0
