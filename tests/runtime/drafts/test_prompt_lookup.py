"""Proves prompt lookup: what it proposes followed the same n-gram before, several continuations make one tree, rolling
back forgets, and the text stays the target's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime import load
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.policies.base import ChainBudget, DepthBudget
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Tree
from dovetail.runtime.trees.verified import Verified

CHAIN = TreeShape(nodes=8, depth=7, width=1)
WIDE = TreeShape(nodes=16, depth=4, width=3)


def tell(draft: LookupDraft, tokens: list[int]) -> None:
    """The text goes on with `tokens`."""
    begin = draft.known
    known = draft._text[begin:]
    draft.tell(Verified(begin, np.array([*known, *tokens]), np.zeros((len(known) + len(tokens) - 1, 4), np.float32)))


def propose(draft: LookupDraft, tokens: list[int], shape: TreeShape) -> Tree:
    tell(draft, tokens)
    return draft.grow(tokens[-1], DepthBudget(shape.depth, shape.width)).candidates.best(shape.nodes - 1)


def paths(tree: Tree) -> set[tuple[int, ...]]:
    """The drafted nodes as the tokens from below the root to them."""
    found: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree)):
        found.append((*found[tree.parents[node]], int(tree.tokens[node])))
    return set(found[1:])


def test_a_repeated_text_is_offered_to_the_depth_asked_for() -> None:
    tree = propose(LookupDraft(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3], CHAIN)
    assert tree.tokens.tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]


def test_matches_that_differ_make_a_tree_with_the_frequent_one_first() -> None:
    tree = propose(LookupDraft(), [1, 2, 5, 0, 1, 2, 6, 0, 1, 2, 5, 9, 1, 2], TreeShape(4, 1, 3))
    assert tree.tokens.tolist() == [2, 5, 6]
    assert tree.parents.tolist() == [-1, 0, 0]


def test_the_longest_match_counts() -> None:
    tree = propose(LookupDraft(), [7, 1, 2, 5, 8, 1, 2, 6, 8, 1, 2, 6, 7, 1, 2], TreeShape(2, 1, 1))
    assert tree.tokens.tolist() == [2, 5]


def test_the_longer_the_match_the_longer_the_chain() -> None:
    shape = TreeShape(64, 63, 1)
    sizes = [len(propose(LookupDraft(), [*range(200), *range(100, 100 + matched)], shape)) for matched in (2, 4, 8, 16)]
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 7
    assert sizes[-1] > 32


def test_what_few_matches_agree_on_is_not_offered() -> None:
    text = [token for i in range(8) for token in (1, 2, 10 + i % 2, 20 + i)]
    assert paths(propose(LookupDraft(), [*text, 1, 2], WIDE)) == {(10,), (11,)}


@pytest.mark.parametrize("shape", [CHAIN, WIDE])
def test_a_text_without_repetition_gets_no_tree(shape: TreeShape) -> None:
    assert len(propose(LookupDraft(), list(range(40)), shape)) == 1


def test_where_no_tree_is_wanted_there_is_none() -> None:
    draft = LookupDraft()
    tell(draft, [1, 2, 3, 4, 1, 2])
    assert len(draft.grow(2, DepthBudget(0, 3)).candidates) == 0
    assert draft.grow(2, DepthBudget(2, 3)).candidates.best(8).tokens.tolist() == [2, 3, 4]


def test_a_chain_is_the_most_frequent_continuation() -> None:
    draft = LookupDraft()
    tell(draft, [1, 2, 5, 0, 1, 2, 6, 0, 1, 2, 5, 9, 1, 2])
    chain = draft.grow(2, ChainBudget(DepthBudget(3, 3))).candidates.best(8)
    assert chain.is_chain()
    assert chain.tokens.tolist()[:2] == [2, 5]


def test_scores_are_the_chances_it_gives() -> None:
    """m + 0.5 of m + 2 that a match of m tokens goes on, with one more at every step."""
    draft = LookupDraft()
    tell(draft, [*range(20), *range(5, 10)])
    expected, chance = [], 1.0
    for matched in range(5, 9):
        chance *= (matched + 0.5) / (matched + 2)
        expected.append(chance)
    scores = draft.grow(9, DepthBudget(4, 1)).candidates.scores
    assert np.exp(scores) == pytest.approx(expected)


def test_what_is_known_is_told_again_without_harm() -> None:
    draft, text = LookupDraft(), [1, 2, 3, 4, 5, 1, 2]
    tell(draft, text)
    for begin in (0, 3, 6):
        draft.tell(Verified(begin, np.array(text[begin:]), np.zeros((len(text) - begin - 1, 4), np.float32)))
        assert draft.known == len(text) - 1
    assert draft.grow(2, DepthBudget(2, 1)).candidates.best(8).tokens.tolist() == [2, 3, 4]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 5))
def test_every_path_follows_an_earlier_occurrence_of_the_last_ngram(text: list[int], step: int) -> None:
    draft = LookupDraft()
    for begin in range(0, len(text), step):
        tree = propose(draft, text[begin : begin + step], WIDE)
    for path in paths(tree):
        offered = [*text[-2:], *path]
        assert any(text[i : i + len(offered)] == offered for i in range(len(text)))


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.data())
def test_rolling_back_is_as_if_it_had_never_been_read(text: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(text) - 1))
    draft, fresh = LookupDraft(), LookupDraft()
    propose(draft, text, WIDE)
    draft.truncate(kept)
    assert draft.known == kept
    more, left = [1, 0, 1], text[: kept + 1] if kept else []  # the token behind the newest pair stays with it
    assert paths(propose(draft, more, WIDE)) == paths(propose(fresh, [*left, *more], WIDE))
    draft.close()
    assert (draft.known, draft._ends) == (0, {})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_the_same_as_without(tiny_artifact: Path, temperature: float) -> None:
    tokens = [5, 9, 300, 7]
    seen = dict.fromkeys(tokens, 100.0)  # what is drawn has been seen before
    prompt, settings = tokens * 8, {"temperature": temperature, "seed": 2, "max_new_tokens": 60, "logit_bias": seen}
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="none") as pipe:
        expected = pipe.generate(prompt, ignore_eos=True, **settings).token_ids
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="lookup") as pipe:
        with pipe.conversation() as conversation:
            done = pipe.stream(prompt, conversation=conversation, ignore_eos=True, **settings).finish()
            again = pipe.stream(prompt, conversation=conversation, ignore_eos=True, **settings).finish()
        assert pipe.draft_kind == "lookup"
    assert done.token_ids == again.token_ids == expected
    assert done.drafted_tokens > 0
    assert done.draft_failure is None
