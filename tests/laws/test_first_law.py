"""Proves the first law with real engines: in `exact` numerics the token ids with the draft are those without it,
greedy and sampled, on held-out text with the shipped artifact, and on a target of random weights with drafts that
always, never and sometimes guess right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dovetail.runtime.decoding.rounds import rounds
from fakes import chain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dovetail.export.training import corpus
from dovetail.runtime import GenerationConfig, load
from dovetail.runtime.decoding import rounds as engine
from dovetail.runtime.drafts.base import Draft, Foresight, NoDraft, blind
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.policies.base import FixedPolicy, Growth
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.trees.acceptance import Accepted, Draw, accept
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, root_only

NUM_PROMPTS, NEW_TOKENS = 50, 128
SAMPLED = GenerationConfig(temperature=1.0, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def shipped(shipped_artifact: Path) -> Pipeline:
    return load(shipped_artifact, numerics="exact", ctx_size=512)


@pytest.fixture(scope="module")
def shipped_plain(shipped_artifact: Path) -> Pipeline:
    return load(shipped_artifact, numerics="exact", ctx_size=512, draft="none")


@pytest.fixture(scope="module")
def held_out_prompts() -> list[str]:
    """The beginnings of functions in files that the shipped models were not trained on."""
    texts = list(corpus.standard_library().held_out.values())
    starts = [text[i : i + 300] for text in texts for i in range(0, len(text) - 300, 4000)]
    return starts[:: max(1, len(starts) // NUM_PROMPTS)][:NUM_PROMPTS]


@pytest.mark.parametrize("params", [GenerationConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_shipped_artifact_with_and_without_its_draft(
    params: GenerationConfig, shipped: Pipeline, shipped_plain: Pipeline, held_out_prompts: list[str]
) -> None:
    assert len(held_out_prompts) == NUM_PROMPTS
    accepted = 0
    for prompt in held_out_prompts:
        with_draft = shipped.generate(prompt, params, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        without = shipped_plain.generate(prompt, params, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        assert with_draft.token_ids == without.token_ids
        assert len(without.token_ids) == NEW_TOKENS
        accepted += with_draft.totals.accepted_tokens
    assert accepted > NUM_PROMPTS * NEW_TOKENS / 4, "a law about a draft that is never believed would prove nothing"


def test_the_law_notices_an_accept_that_takes_the_drafts_token_unseen(
    shipped: Pipeline, shipped_plain: Pipeline, held_out_prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unseen(
        tree: Tree, logits: Float32s, draw: Draw, limit: int | None = None, ends: frozenset[int] = frozenset()
    ) -> Accepted:
        children = tree.families()[0]
        if not children or limit == 1:
            return accept(tree, logits, draw, limit, ends)
        token, child = next(iter(children.items()))
        return Accepted([0, child], [token, draw(logits[child])])

    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    expected = [shipped_plain.generate(prompt, greedy).token_ids for prompt in held_out_prompts[:5]]
    monkeypatch.setattr(engine, "accept", unseen)
    assert [shipped.generate(prompt, greedy).token_ids for prompt in held_out_prompts[:5]] != expected


def test_a_draft_fed_shuffled_features_loses_its_accept_length(
    shipped: Pipeline, held_out_prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairing of features and tokens is real: the same draft, fed other positions' features, guesses badly."""

    def accept_length() -> float:
        runs = [shipped.generate(p, SAMPLED, max_new_tokens=64, ignore_eos=True).totals for p in held_out_prompts[:8]]
        return sum(t.accepted_tokens for t in runs) / sum(t.rounds for t in runs)

    aligned = accept_length()
    assert shipped.draft is not None
    make = shipped.draft.sequence
    rng = np.random.default_rng(0)

    def shuffled() -> Draft:
        sequence = make()
        propose = sequence.propose
        seen: list[Float32s] = []

        def propose_shuffled(tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
            seen.extend(features)
            others = np.array([seen[i] for i in rng.integers(0, len(seen), len(features))], np.float32)
            return propose(tokens, others.reshape(features.shape), growth, foresight)

        monkeypatch.setattr(sequence, "propose", propose_shuffled)
        return sequence

    monkeypatch.setattr(shipped.draft, "sequence", shuffled)
    assert accept_length() < 0.6 * aligned


class Scripted:
    """A draft that knows the text to come and offers it wholly, never, or now and then."""

    native_s = 0.0
    bytes_in = bytes_out = 0

    def __init__(self, text: list[int], keep: Callable[[int], bool], vocab_size: int) -> None:
        self._text, self._keep, self._vocab_size = text, keep, vocab_size
        self._done = 0

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        self._done += len(tokens) if self._done else 2  # the first of the text comes with the prompt
        depth = next(depth for depth in range(99) if not growth.goes_on(depth, [0.0]))
        ahead = self._text[self._done - 1 : self._done - 1 + depth]
        guesses = [t if self._keep(self._done + i) else (t + 1) % self._vocab_size for i, t in enumerate(ahead)]
        return chain(int(tokens[-1]), guesses) if guesses else root_only(int(tokens[-1]))


@pytest.mark.parametrize("params", [GenerationConfig(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("keep", "low", "high"),
    [
        pytest.param(lambda i: True, 3.5, 5.0, id="always"),
        pytest.param(lambda i: False, 0.0, 0.0, id="never"),
        pytest.param(lambda i: i % 3 != 0, 0.5, 2.5, id="sometimes"),
    ],
)
def test_random_weights_with_scripted_drafts(
    tiny_artifact: Path, params: GenerationConfig, keep: Callable[[int], bool], low: float, high: float
) -> None:
    pipe = load(tiny_artifact, numerics="exact", draft="none", ctx_size=256)
    prompt = np.array([5, 9, 300, 7])
    vocab = pipe.artifact.manifest.target.vocab_size

    def run(draft: Draft) -> Iterator[engine.Round]:
        target = pipe.target.sequence()
        yield from rounds(
            target, draft, FixedPolicy(TreeShape(6, 5, 1)), Sampler(params, prompt.tolist(), vocab).draw, prompt, 120
        )
        target.close()

    expected = [token for done in run(NoDraft()) for token in done.tokens]
    lengths, tokens = [], []
    for done in run(Scripted(expected, keep, vocab)):
        tokens += done.tokens
        if done.nodes:
            lengths.append(done.accept_length)
    assert tokens == expected
    assert low <= np.mean(lengths) <= high


@pytest.fixture(scope="module")
def tiny(tiny_artifact: Path) -> Pipeline:
    return load(tiny_artifact, numerics="exact", ctx_size=256)


TOKENS = st.integers(0, 511)
CONTROLS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**64 - 1),
        "max_new_tokens": st.integers(1, 40),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    },
    optional={
        "min_new_tokens": st.just(1),
        "top_k": st.sampled_from([1, 7, 100]),
        "top_p": st.sampled_from([0.3, 0.95]),
        "min_p": st.sampled_from([0.01, 0.2]),
        "typical_p": st.sampled_from([0.5, 0.9]),
        "repetition_penalty": st.sampled_from([0.8, 1.2]),
        "presence_penalty": st.sampled_from([-0.5, 0.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.5]),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-5, 5), max_size=4),
        "no_repeat_ngram_size": st.integers(1, 3),
        "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=2), max_size=3),
        "eos_token_id": st.lists(TOKENS, max_size=60),
    },
)
SHAPES = st.builds(TreeShape, nodes=st.integers(1, 24), depth=st.integers(0, 6), width=st.integers(1, 10))


class RandomTrees(Scripted):
    """Branching trees of random tokens, with the text to come hidden in a random branch of some of them."""

    def __init__(self, text: list[int], seed: int, vocab_size: int) -> None:
        super().__init__(text, lambda i: True, vocab_size)
        self._rng = np.random.default_rng(seed)

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        true = super().propose(tokens, features, growth)
        size = min(1 + growth.drafted([0.0] * 11), 12)
        parents = [-1] + [int(self._rng.integers(0, i)) for i in range(1, size)]
        drafted = self._rng.integers(0, self._vocab_size, size)
        drafted[0] = tokens[-1]
        node = 0
        for token in true.tokens[1:]:  # down a random branch
            children = [i for i in range(1, size) if parents[i] == node]
            if not children:
                break
            node = int(self._rng.choice(children))
            drafted[node] = token
        return Tree(drafted, np.array(parents))


def no_guess(expected: list[int], vocab: int) -> Draft:
    return NoDraft()


def knows_it_all(expected: list[int], vocab: int) -> Draft:
    return Scripted(expected, lambda i: True, vocab)


def knows_every_third(expected: list[int], vocab: int) -> Draft:
    return Scripted(expected, lambda i: i % 3 == 0, vocab)


def always_wrong(expected: list[int], vocab: int) -> Draft:
    return Scripted(expected, lambda i: False, vocab)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    CONTROLS,
    SHAPES,
    st.lists(TOKENS, min_size=1, max_size=30),
    st.sampled_from(["own", "scripted", "random tree"]),
    st.data(),
)
def test_any_controls_any_tree_any_draft(
    tiny: Pipeline, controls: dict[str, Any], shape: TreeShape, prompt: list[int], kind: str, data: st.DataObject
) -> None:
    """Controls, seeds, trees and drafts at random; the artifact's own draft has random weights, the others a script."""
    config = tiny.config(**controls)
    vocab = tiny.artifact.manifest.target.vocab_size

    def run(draft: Draft, shape: TreeShape) -> list[int]:
        target, draw = tiny.target.sequence(), Sampler(config, prompt, vocab).draw
        length, ends = config.max_new_tokens or 1, config.eos_token_id
        try:
            loop = rounds(target, draft, FixedPolicy(shape), draw, np.array(prompt), length, ends)
            return [token for done in loop for token in done.tokens]
        finally:
            target.close()

    expected = run(NoDraft(), TreeShape(1, 0, 1))
    if kind == "own":
        assert tiny.draft is not None
        draft: Draft = tiny.draft.sequence()
    elif kind == "random tree":
        draft = RandomTrees(expected, data.draw(st.integers(0, 1000)), vocab)
    else:
        make = data.draw(st.sampled_from([no_guess, knows_it_all, knows_every_third, always_wrong]))
        draft = make(expected, vocab)
    assert run(draft, shape) == expected
