"""Proves losslessness as a distribution: over random trees, the outputs of many seeds, and of texts that share their
passes, follow the target's exact distribution, enumerated token by token, with every kind of control; and the same test
rejects a common wrong acceptance rule.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from campaign import played
from fakes.costs import FREE
from fakes.drafts import Texts
from fakes.guesses import FakeDraft
from fakes.target import FakeTarget, row_after
from scipy import stats
from texts.one_text import decode

from dovetail.runtime.decoding import sequence as decoding
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.sampling import processors
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.trees.acceptance import Accepted, Draw
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Float32s, Tree

VOCAB, LENGTH, RUNS = 4, 3, played(2000, of=6000)
PROMPT = [1, 2]
CASES = [
    pytest.param({"temperature": 0.5}, id="T=0.5"),
    pytest.param({"temperature": 1.0}, id="T=1"),
    pytest.param({"temperature": 1.5}, id="T=1.5"),
    pytest.param({"temperature": 1.0, "top_p": 0.8}, id="top_p=0.8"),
    pytest.param({"temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 0.5}, id="penalties"),
    pytest.param({"temperature": 1.0, "frequency_penalty": 0.8}, id="frequency"),
    pytest.param({"temperature": 0.8, "logit_bias": {0: 1.5, 3: -1.0}}, id="logit bias"),
    pytest.param({"temperature": 1.0, "min_p": 0.1, "no_repeat_ngram_size": 2}, id="no repetition"),
]


def exact(config: GenerationConfig) -> dict[tuple[int, ...], float]:
    """Probability of each output of `LENGTH` tokens, from the target's own rows."""
    probabilities = {}
    for output in itertools.product(range(VOCAB), repeat=LENGTH):
        sampler, likelihood = Sampler(config, PROMPT, VOCAB), 1.0
        for position, token in enumerate(output):
            row = row_after([*PROMPT, *output[:position]], VOCAB)
            likelihood *= processors.softmax(sampler.processed(row))[token]
            force(sampler, token)
        probabilities[output] = likelihood
    return probabilities


def force(sampler: Sampler, token: int) -> None:
    """Make `token` the next of the sampler's text."""
    sampler.follow(token)


def random_draft(rng: np.random.Generator) -> FakeDraft:
    """Guesses by the length of the text alone."""
    guesses = [rng.integers(0, VOCAB, 3).tolist() for _ in range(6)]
    return FakeDraft(lambda context: guesses[len(context) % 6])


def random_shape(rng: np.random.Generator) -> TreeShape:
    return TreeShape(int(rng.integers(1, 9)), int(rng.integers(0, 4)), int(rng.integers(1, 4)))


def observe(controls: dict[str, Any], runs: int = RUNS) -> Counter[tuple[int, ...]]:
    """Outputs of `runs` seeds, each with a random draft and a random tree shape."""
    rng = np.random.default_rng(0)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(runs):
        sampler = Sampler(GenerationConfig(seed=seed, **controls), PROMPT, VOCAB)
        draft, shape = random_draft(rng), random_shape(rng)
        updates = decode(FakeTarget(VOCAB), draft, shape, sampler, PROMPT, LENGTH, foresight=sampler.foresee)
        counts[tuple(updates.tokens)] += 1
    return counts


def observe_together(controls: dict[str, Any], runs: int = RUNS) -> Counter[tuple[int, ...]]:
    """The same, three answers of every seed in the same passes, one of them without a draft."""
    rng = np.random.default_rng(0)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(runs // 3):
        policy = Policy("fixed", random_shape(rng), is_wish=True)
        texts = Texts(FakeTarget(VOCAB), GenerationConfig(seed=seed, **controls), policy, FREE)
        readers = texts.make([PROMPT] * 3, LENGTH, [random_draft(rng), None, random_draft(rng)])
        counts.update(tuple(reader.tokens) for reader in readers)
    return counts


def compare(observed: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> tuple[float, float, float]:
    """(p-value of chi-square over outputs expected 5 times or more, total variation, that of a fair sampler's noise)"""
    runs = observed.total()
    common = [output for output, p in expected.items() if p * runs >= 5]
    seen = [observed[output] for output in common]
    wanted = [expected[output] * runs for output in common]
    rare = runs - sum(wanted)
    if rare >= 5:
        seen.append(runs - sum(seen))
        wanted.append(rare)
    p_value = float(stats.chisquare(seen, np.array(wanted) * sum(seen) / sum(wanted)).pvalue)
    variation = 0.5 * sum(abs(observed[output] / runs - p) for output, p in expected.items())
    noise = 0.5 * sum(np.sqrt(2 * p * (1 - p) / (np.pi * runs)) for p in expected.values())
    return p_value, variation, noise


@pytest.mark.parametrize("observed_by", [observe, observe_together], ids=["alone", "together"])
@pytest.mark.parametrize("controls", CASES)
def test_outputs_follow_the_exact_distribution(
    controls: dict[str, Any], observed_by: Callable[..., Counter[tuple[int, ...]]]
) -> None:
    expected = exact(GenerationConfig(**controls))
    assert sum(expected.values()) == pytest.approx(1)
    observed = observed_by(controls)
    assert all(expected[output] > 0 for output in observed), "an output that the target cannot produce"
    p_value, variation, noise = compare(observed, expected)
    print(f"{controls}: p {p_value:.3f}, total variation {variation:.4f}, noise floor {noise:.4f}")
    assert p_value > 1e-4
    assert variation < 1.5 * noise


def test_a_wrong_acceptance_rule_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule: accept a child when r <= p_draft / p_target, else draw from the target independently of what was
    refused. Here p_draft is uniform.
    """
    rng = np.random.default_rng(1)

    def inverted_ratio(
        tree: Tree, logits: Float32s, draw: Draw, limit: int | None = None, ends: frozenset[int] = frozenset()
    ) -> Accepted:
        path, tokens = [0], []
        while len(tokens) + 1 != limit:
            target = processors.softmax(logits[path[-1]].astype(np.float64))
            children = tree.families()[path[-1]].items()
            taken = next(((t, c) for t, c in children if rng.random() <= (1 / VOCAB) / target[t]), None)
            if taken is None:
                break
            tokens.append(taken[0])
            path.append(taken[1])
        return Accepted(path, [*tokens, draw(logits[path[-1]])])

    expected = exact(GenerationConfig(temperature=1.0))
    monkeypatch.setattr(decoding, "accept", inverted_ratio)
    p_value, variation, noise = compare(observe({"temperature": 1.0}), expected)
    print(f"wrong rule: p {p_value:.1e}, total variation {variation:.4f}, noise floor {noise:.4f}")
    assert p_value < 1e-6
    assert variation > 3 * noise
