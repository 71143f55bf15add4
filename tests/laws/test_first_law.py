"""Proves the first law with real engines: the token ids and log-probabilities with the draft are those without it,
greedy and sampled, on held-out text with the shipped artifact in `fast` numerics, and in both on a target of random
weights with drafts that always, never and sometimes guess right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign import played
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts.one_text import Updates, decode

from dovetail.export.training import corpus
from dovetail.runtime import GenerationConfig, load
from dovetail.runtime.decoding import sequence as decoding
from dovetail.runtime.decoding.generation import Generation
from dovetail.runtime.drafts.base import Draft, Foresight, Grown, blind
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.policies.base import TreeBudget
from dovetail.runtime.sampling.sampler import Sampler, TokenLogprobs
from dovetail.runtime.trees.acceptance import Accepted, Draw, accept
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import CandidateTree, Float32s, Tree
from dovetail.runtime.trees.verified import Verified

NUM_PROMPTS, NEW_TOKENS = played(20, of=50), played(96, of=128)
SAMPLED = GenerationConfig(temperature=1.0, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def shipped(shipped_artifact: Path) -> Pipeline:
    return load(shipped_artifact, ctx_size=512)


@pytest.fixture(scope="module")
def shipped_plain(shipped_artifact: Path) -> Pipeline:
    return load(shipped_artifact, ctx_size=512, draft="none")


@pytest.fixture(scope="module")
def held_out_prompts() -> list[str]:
    """The beginnings of functions in files that the shipped models were not trained on."""
    texts = list(corpus.standard_library().held_out.values())
    starts = [text[i : i + 300] for text in texts for i in range(0, len(text) - 300, 4000)]
    return starts[:: max(1, len(starts) // NUM_PROMPTS)][:NUM_PROMPTS]


def written(text: Generation) -> tuple[list[int], list[TokenLogprobs]]:
    """What must be the same."""
    return text.token_ids, text.logprobs


@pytest.mark.parametrize("params", [GenerationConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_shipped_artifact_with_and_without_its_draft(
    params: GenerationConfig, shipped: Pipeline, shipped_plain: Pipeline, held_out_prompts: list[str]
) -> None:
    """The drafted texts share their passes, the plain ones theirs; some of each are made alone besides."""
    assert len(held_out_prompts) == NUM_PROMPTS
    controls = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 0}
    together = shipped.generate(held_out_prompts, params, **controls)
    expected = [written(text) for text in shipped_plain.generate(held_out_prompts, params, **controls)]
    assert [written(text) for text in together] == expected
    assert {len(tokens) for tokens, _ in expected} == {NEW_TOKENS}
    for prompt, text in list(zip(held_out_prompts, expected, strict=True))[::5]:
        assert written(shipped_plain.generate(prompt, params, **controls)) == text
    alone = [shipped.generate(prompt, params, **controls) for prompt in held_out_prompts[::5]]
    assert [written(text) for text in alone] == expected[::5]
    accepted = 5 * sum(text.totals.accepted_tokens for text in alone)
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
    monkeypatch.setattr(decoding, "accept", unseen)
    assert [shipped.generate(prompt, greedy).token_ids for prompt in held_out_prompts[:5]] != expected


def test_a_draft_fed_shuffled_features_loses_its_accept_length(
    shipped: Pipeline, held_out_prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairing of features and tokens is real: the same draft, fed other positions' features, guesses badly."""

    def accept_length() -> float:
        runs = [shipped.generate(p, SAMPLED, max_new_tokens=64, ignore_eos=True).totals for p in held_out_prompts[:8]]
        return sum(t.accepted_tokens for t in runs) / sum(t.rounds for t in runs)

    aligned = accept_length()
    rng, seen = np.random.default_rng(0), list[Float32s]()
    tell = ModelDraft.tell

    def tell_shuffled(draft: ModelDraft, verified: Verified) -> None:
        seen.extend(verified.features.copy())
        others = [seen[i] for i in rng.integers(0, len(seen), len(verified.features))]
        features = np.array(others, np.float32).reshape(verified.features.shape)
        tell(draft, Verified(verified.begin, verified.tokens, features))

    monkeypatch.setattr(ModelDraft, "tell", tell_shuffled)
    assert accept_length() < 0.6 * aligned


class Scripted:
    """A draft that knows the text to come and offers it wholly, never, or now and then."""

    def __init__(self, prompt: Sequence[int], text: list[int], keep: Callable[[int], bool], vocab_size: int) -> None:
        self._prompt_length, self._text, self._keep, self._vocab_size = len(prompt), text, keep, vocab_size
        self.known = 0

    def tell(self, verified: Verified) -> None:
        self.known = max(self.known, verified.end)

    def truncate(self, known: int) -> None:
        self.known = min(self.known, known)

    def close(self) -> None:
        self.known = 0

    def ahead(self) -> list[int]:
        """The tokens to come, some of them wrong."""
        written = self.known + 1 - self._prompt_length  # of the answer
        return [
            token if self._keep(written + i) else (token + 1) % self._vocab_size
            for i, token in enumerate(self._text[written:])
        ]

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> Grown:
        candidates = CandidateTree(root)
        for token in self.ahead():
            if not budget.wants_level(candidates.levels):
                break
            candidates.add_level([candidates.newest if len(candidates) else 0], [token], [0.0])
        return Grown(candidates)


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
    pipe = load(tiny_artifact, draft="none", ctx_size=256)
    prompt = [5, 9, 300, 7]
    vocab = pipe.artifact.manifest.target.vocab_size

    def run(draft: Draft | None) -> Updates:
        return decode(pipe.target, draft, TreeShape(6, 5, 1), Sampler(params, prompt, vocab), prompt, 120)

    expected = run(None).tokens
    drafted = run(Scripted(prompt, expected, keep, vocab))
    assert drafted.tokens == expected
    assert low <= np.mean(drafted.accept_lengths) <= high


@pytest.fixture(scope="module", params=["fast", "exact"])
def tiny(tiny_artifact: Path, request: pytest.FixtureRequest) -> Pipeline:
    return load(tiny_artifact, numerics=request.param, ctx_size=256)


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

    def __init__(self, prompt: Sequence[int], text: list[int], seed: int, vocab_size: int) -> None:
        super().__init__(prompt, text, lambda i: True, vocab_size)
        self._rng = np.random.default_rng(seed)

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> Grown:
        candidates, expanded = CandidateTree(root), [0]
        for token in self.ahead():
            if not budget.wants_level(candidates.levels):
                break
            parents = self._rng.choice(expanded, int(self._rng.integers(1, 5))).tolist()
            tokens = self._rng.integers(0, self._vocab_size, len(parents)).tolist()
            place = int(self._rng.integers(0, len(parents)))
            parents[place], tokens[place] = expanded[-1], token
            first = candidates.add_level(parents, tokens, np.sort(-self._rng.random(len(parents)))[::-1].tolist())
            expanded = [*range(first, first + len(parents)), first + place]
        return Grown(candidates)


MakeDraft = Callable[[list[int], list[int], int], Draft | None]


def no_guess(prompt: list[int], expected: list[int], vocab: int) -> None:
    return None


def knows_it_all(prompt: list[int], expected: list[int], vocab: int) -> Draft:
    return Scripted(prompt, expected, lambda i: True, vocab)


def knows_every_third(prompt: list[int], expected: list[int], vocab: int) -> Draft:
    return Scripted(prompt, expected, lambda i: i % 3 == 0, vocab)


def always_wrong(prompt: list[int], expected: list[int], vocab: int) -> Draft:
    return Scripted(prompt, expected, lambda i: False, vocab)


@settings(max_examples=played(30, of=60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    config = tiny.config(logprobs=2, **controls)
    vocab = tiny.artifact.manifest.target.vocab_size

    def run(draft: Draft | None) -> tuple[list[int], list[TokenLogprobs]]:
        sampler = Sampler(config, prompt, vocab)
        ends, count = config.eos_token_id, config.max_new_tokens or 1
        updates = decode(tiny.target, draft, shape, sampler, prompt, count, ends=ends, graph=tiny.draft)
        return updates.tokens, sampler.logprobs

    expected, logprobs = run(None)
    if kind == "own":
        assert tiny.draft is not None
        draft: Draft | None = ModelDraft(tiny.draft)
    elif kind == "random tree":
        draft = RandomTrees(prompt, expected, data.draw(st.integers(0, 1000)), vocab)
    else:
        make: MakeDraft = data.draw(st.sampled_from([no_guess, knows_it_all, knows_every_third, always_wrong]))
        draft = make(prompt, expected, vocab)
    assert run(draft) == (expected, logprobs)
    assert tiny.target.free == tiny.target.capacity
