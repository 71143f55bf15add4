"""Proves the first law on the engine with one text: with any draft and any tree the tokens are those of plain decoding,
greedy or sampled; and that a broken acceptance rule would be noticed. What many texts do to one another is in
tests/laws/test_batching.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from fakes.costs import FREE
from fakes.guesses import FakeDraft, good, never, sometimes
from fakes.pipeline import FakePipeline
from fakes.target import FakeSequence, FakeTarget, row_after
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.runtime.decoding import sequence as decoding
from dovetail.runtime.decoding.engine import Update
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.drafts.base import Draft, blind
from dovetail.runtime.errors import NothingAllowedError
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import Step
from dovetail.runtime.trees.acceptance import Accepted
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Float32s, Tree

DRAFTS = [good, never, sometimes]
PROMPT = [1, 2, 3, 4]
MakeDraft = Callable[[FakeTarget], Draft]


class Reader:
    """Hears of one text's updates."""

    def __init__(self) -> None:
        self.updates: list[Update] = []

    def hear(self, update: Update) -> None:
        self.updates.append(update)

    @property
    def tokens(self) -> list[int]:
        return [token for update in self.updates for token in update.tokens]

    @property
    def lengths(self) -> list[int]:
        """Accept lengths of all rounds but those that read the prompt."""
        return [update.accept_length for update in self.updates if update.nodes]


def decode(
    target: FakeTarget,
    make_draft: MakeDraft | None,
    shape: TreeShape,
    params: GenerationConfig,
    count: int,
    prompt: Sequence[int] = PROMPT,
) -> tuple[Reader, Exception | None]:
    """What a reader heard of one text, and the error that ended it, if one did."""
    pipe = FakePipeline(target, costs=FREE)
    conversation = pipe.conversation(None if make_draft is None else make_draft(target))
    sampler = Sampler(params, prompt, target.vocab)
    sequence = TextSequence(
        prompt,
        conversation.cache,
        sampler=sampler,
        pace=Pace(Policy("plain") if make_draft is None else Policy("fixed", shape, is_wish=True)),
        max_new_tokens=count,
        ends=params.eos_token_id,
        foresight=sampler.foresee if params.temperature > 0 else blind,
        window=target.window,
    )
    reader, ended = Reader(), []
    pipe.engine.add(sequence, reader.hear, lambda: ended.append(1))
    while not pipe.engine.is_idle:
        pipe.engine.step()
        kept = conversation.cache.target
        assert isinstance(kept, FakeSequence)
        assert kept.tokens == [*prompt, *reader.tokens][:-1], "the last emitted token is never in the cache"
    assert ended == [1]
    assert conversation.cache.model is None or conversation.cache.model.failure is None
    conversation.cache.close()
    assert target.free == target.capacity
    return reader, sequence.error


def run(
    make_draft: MakeDraft | None,
    shape: TreeShape,
    params: GenerationConfig,
    count: int,
    prompt: Sequence[int] = PROMPT,
    salt: int = 0,
) -> tuple[list[int], list[int]]:
    """(tokens, accept lengths behind the token that comes with the prompt)"""
    reader, error = decode(FakeTarget(salt=salt), make_draft, shape, params, count, prompt)
    assert error is None
    return reader.tokens, reader.lengths


def plain(params: GenerationConfig, count: int, prompt: Sequence[int] = PROMPT, salt: int = 0) -> list[int]:
    """One token at a time, without the engine."""
    text = list(prompt)
    sampler = Sampler(params, text, 12)
    for _ in range(count):
        text.append(sampler.draw(row_after(text, 12, salt)))
    return text[len(prompt) :]


@settings(deadline=None)
@given(
    st.sampled_from(DRAFTS),
    st.builds(TreeShape, nodes=st.integers(1, 20), depth=st.integers(0, 6), width=st.integers(1, 4)),
    st.builds(
        GenerationConfig,
        temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        top_k=st.sampled_from([0, 3]),
        top_p=st.sampled_from([1.0, 0.8]),
        seed=st.integers(0, 2**64 - 1),
    ),
    st.integers(1, 40),
    st.lists(st.integers(0, 11), min_size=1, max_size=6),
    st.integers(0, 1000),
)
def test_first_law(
    make_draft: MakeDraft,
    shape: TreeShape,
    params: GenerationConfig,
    count: int,
    prompt: list[int],
    salt: int,
) -> None:
    tokens, _ = run(make_draft, shape, params, count, prompt, salt)
    assert tokens == plain(params, count, prompt, salt)


def test_a_good_draft_is_always_accepted_and_a_bad_one_never() -> None:
    shape, greedy = TreeShape(nodes=5, depth=4, width=1), GenerationConfig()
    assert run(good, shape, greedy, 41)[1] == [4] * 8
    assert run(never, shape, greedy, 41)[1] == [0] * 40
    lengths = run(sometimes, TreeShape(nodes=16, depth=4, width=3), greedy, 200)[1]
    assert min(lengths) == 0
    assert max(lengths) > 0


def test_no_draft_is_one_token_a_round() -> None:
    tokens, lengths = run(None, TreeShape(nodes=8, depth=4, width=4), GenerationConfig(temperature=1.0, seed=3), 20)
    assert tokens == plain(GenerationConfig(temperature=1.0, seed=3), 20)
    assert lengths == [0] * 19


def take_the_draft_unseen(
    tree: Tree, logits: Float32s, draw: object, limit: int | None = None, ends: object = None
) -> Accepted:
    """A mutant: believes the first drafted child at every node, and lets the target speak only at the end."""
    path, tokens = [0], []
    while (children := tree.families()[path[-1]]) and len(tokens) + 1 != limit:
        token, child = next(iter(children.items()))
        path.append(child)
        tokens.append(token)
    return Accepted(path, [*tokens, int(logits[path[-1]].argmax())])


def always_accept_the_runner_up(
    tree: Tree, logits: Float32s, draw: Callable[[Float32s], int], limit: int | None = None, ends: object = None
) -> Accepted:
    """A mutant: a child among the target's two best counts as agreed."""
    path, tokens = [0], [draw(logits[0])]
    while len(tokens) != limit:
        best = np.argsort(-logits[path[-1]])[:2].tolist()
        found = [(t, c) for t, c in tree.families()[path[-1]].items() if t in best]
        if not found:
            break
        tokens[-1], child = found[-1]
        path.append(child)
        tokens.append(draw(logits[child]))
    return Accepted(path, tokens)


@pytest.mark.parametrize("mutant", [take_the_draft_unseen, always_accept_the_runner_up])
@pytest.mark.parametrize("make_draft", [good, sometimes])
def test_the_first_law_test_notices_a_broken_accept(
    mutant: Callable[..., Accepted], make_draft: Callable[[FakeTarget], FakeDraft], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "accept", mutant)
    tokens, _ = run(make_draft, TreeShape(nodes=12, depth=4, width=3), GenerationConfig(temperature=1.0, seed=1), 60)
    assert tokens != plain(GenerationConfig(temperature=1.0, seed=1), 60)


def plain_until(config: GenerationConfig, prompt: list[int], count: int) -> tuple[list[int], bool]:
    """(tokens, whether the next draw failed): one token at a time up to an end token, the count, or a failing draw."""
    sampler, text = Sampler(config, prompt, 12), list(prompt)
    while len(text) - len(prompt) < count and not (len(text) > len(prompt) and text[-1] in config.eos_token_id):
        try:
            text.append(sampler.draw(row_after(text, 12)))
        except NothingAllowedError:
            return text[len(prompt) :], True
    return text[len(prompt) :], False


@settings(deadline=None)
@given(
    st.sampled_from(DRAFTS),
    st.sets(st.integers(0, 11), max_size=3),
    st.lists(st.integers(0, 11), min_size=1, max_size=10),
    st.integers(1, 20),
)
def test_ends_and_failing_draws_come_where_plain_decoding_meets_them(
    make_draft: MakeDraft, ends: set[int], prompt: list[int], count: int
) -> None:
    """No token may occur twice, so texts run out of tokens: a draw behind the end of a text must not be missed."""
    config = GenerationConfig(no_repeat_ngram_size=1, eos_token_id=frozenset(ends))
    reader, error = decode(FakeTarget(), make_draft, TreeShape(16, 4, 4), config, count, prompt)
    assert error is None or isinstance(error, NothingAllowedError)
    assert (reader.tokens, error is not None) == plain_until(config, prompt, count)


@settings(deadline=None)
@given(window=st.integers(1, 40), shape=st.builds(TreeShape, st.integers(1, 12), st.integers(0, 5), st.integers(1, 3)))
def test_trees_have_no_siblings_where_they_reach_beyond_the_window(window: int, shape: TreeShape) -> None:
    """And only there; the tokens are the same, and drafting goes on."""
    target = FakeTarget(window=window)
    trees: list[tuple[int, Tree]] = []

    def watch(steps: Sequence[Step]) -> None:
        (step,) = steps
        if step.wanted is None and (not trees or trees[-1][1] is not step.tree):
            trees.append((step.sequence.length, step.tree))

    target.watch = watch
    reader, _ = decode(target, good, shape, GenerationConfig(), 40)
    assert reader.tokens == plain(GenerationConfig(), 40)
    beyond = [tree for past, tree in trees if past + len(tree) > window]
    assert all(tree.is_chain() for tree in beyond)
    before = [tree for past, tree in trees[:-6] if past + shape.nodes <= window]
    if before and shape.nodes > 2 and shape.depth and shape.width > 1:
        assert not all(tree.is_chain() for tree in before)
    if shape.nodes > 1 and shape.depth:
        assert all(len(tree) > 1 for tree in beyond[:-1]), "chains are drafted where trees can't be"
