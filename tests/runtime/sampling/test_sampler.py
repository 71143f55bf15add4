"""Proves every processor against transformers' own on random rows, and that draws follow the processed distribution
and nothing but (seed, position): the race of a few tokens has the winner of the race of all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.runtime.errors import TargetError, UserError
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.random_times import PositionTimes, RandomTimes
from dovetail.runtime.sampling.sampler import Sampler

V = 60


def sampler(prompt: list[int], generated: list[int] = [], **controls: Any) -> Sampler:  # noqa: B006  # never written
    """A sampler that has already drawn `generated`."""
    made = Sampler(GenerationConfig(**controls), prompt, V)
    for token in generated:
        made.draw(np.where(np.arange(V) == token, 100, -100).astype(np.float32))
    assert made._text.tokens == prompt + generated
    return made


def theirs(processors: list[Any], text: list[int], row: np.ndarray) -> np.ndarray:
    scores = torch.from_numpy(row)[None].double()
    for processor in processors:
        scores = processor(torch.tensor([text]), scores)
    return scores[0].numpy()


CONTROLS = [
    pytest.param({"temperature": 0.7}, lambda _: [hf.TemperatureLogitsWarper(0.7)], id="temperature"),
    pytest.param({"top_k": 5}, lambda _: [hf.TopKLogitsWarper(5)], id="top_k"),
    pytest.param({"top_k": V + 1}, lambda _: [], id="top_k of more than all"),
    pytest.param({"top_p": 0.9}, lambda _: [hf.TopPLogitsWarper(0.9)], id="top_p"),
    pytest.param({"top_p": 1e-9}, lambda _: [hf.TopPLogitsWarper(1e-9)], id="top_p of nearly nothing"),
    pytest.param({"min_p": 0.1}, lambda _: [hf.MinPLogitsWarper(0.1)], id="min_p"),
    pytest.param({"typical_p": 0.6}, lambda _: [hf.TypicalLogitsWarper(0.6)], id="typical_p"),
    pytest.param(
        {"repetition_penalty": 1.3}, lambda _: [hf.RepetitionPenaltyLogitsProcessor(1.3)], id="repetition_penalty"
    ),
    pytest.param({"no_repeat_ngram_size": 1}, lambda _: [hf.NoRepeatNGramLogitsProcessor(1)], id="1-gram"),
    pytest.param({"no_repeat_ngram_size": 3}, lambda _: [hf.NoRepeatNGramLogitsProcessor(3)], id="3-gram"),
    pytest.param(
        {"bad_words_ids": ((7,), (1, 2), (3, 1, 4))},
        lambda _: [hf.NoBadWordsLogitsProcessor([[7], [1, 2], [3, 1, 4]], eos_token_id=[])],
        id="bad_words_ids",
    ),
    pytest.param(
        {"logit_bias": {3: 2.5, 9: -4.0}},
        lambda _: [hf.SequenceBiasLogitsProcessor([[[3], 2.5], [[9], -4.0]])],
        id="logit_bias",
    ),
    pytest.param(
        {"min_new_tokens": 4, "eos_token_id": frozenset({2, 5})},
        lambda prompt: [hf.MinNewTokensLengthLogitsProcessor(len(prompt), 4, [2, 5], device="cpu")],
        id="min_new_tokens",
    ),
    pytest.param(
        {"repetition_penalty": 0.8, "no_repeat_ngram_size": 2, "temperature": 1.7, "top_k": 20, "top_p": 0.8}
        | {"min_p": 0.02, "typical_p": 0.9, "logit_bias": {3: 1.0}, "bad_words_ids": ((8,),)},
        lambda _: [
            hf.SequenceBiasLogitsProcessor([[[3], 1.0]]),
            hf.RepetitionPenaltyLogitsProcessor(0.8),
            hf.NoRepeatNGramLogitsProcessor(2),
            hf.NoBadWordsLogitsProcessor([[8]], eos_token_id=[]),
            hf.TemperatureLogitsWarper(1.7),
            hf.TopKLogitsWarper(20),
            hf.TopPLogitsWarper(0.8),
            hf.MinPLogitsWarper(0.02),
            hf.TypicalLogitsWarper(0.9),
        ],
        id="all, in order",
    ),
]


@pytest.mark.parametrize(("controls", "make"), CONTROLS)
def test_processors_equal_transformers(controls: dict[str, Any], make: Any) -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(40):
        prompt = rng.integers(0, 10, int(rng.integers(2, 20))).tolist()
        row = rng.normal(0, 3, V).astype(np.float32)
        expected = theirs(make(prompt), prompt, row)
        got = sampler(prompt, **{"temperature": 1.0, **controls}).processed(row)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        changed += not np.allclose(got, row)
    assert changed > 0 or controls.get("top_k", 0) > V, "a control that changes nothing is not tested"


def test_penalties_count_generated_tokens_only() -> None:
    row = np.zeros(V, np.float32)
    got = sampler([1, 2, 2], [3, 3, 4], presence_penalty=0.5, frequency_penalty=0.25).processed(row)
    expected = np.zeros(V)
    expected[3], expected[4] = -0.5 - 2 * 0.25, -0.5 - 0.25
    np.testing.assert_allclose(got, expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_ngram_ban_against_the_obvious_version(text: list[int], size: int) -> None:
    banned = {
        text[i + size - 1]
        for i in range(len(text) - size + 1)
        if text[i : i + size - 1] == text[len(text) - size + 1 :]
    }
    got = sampler(text, no_repeat_ngram_size=size).processed(np.zeros(V, np.float32))
    assert set(np.flatnonzero(np.isinf(got)).tolist()) == banned


def test_min_new_tokens_ends() -> None:
    row = np.where(np.arange(V) == 2, 5, 0).astype(np.float32)
    made = sampler([1], min_new_tokens=3, eos_token_id=frozenset({2}))
    drawn = [made.draw(row) for _ in range(4)]
    assert drawn[:3] == [0, 0, 0]
    assert drawn[3] == 2


def test_everything_banned_is_said() -> None:
    made = sampler([0], logit_bias={token: float("-inf") for token in range(V)})
    with pytest.raises(UserError, match="got none"):
        made.draw(np.zeros(V, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_that_yields_no_numbers_is_an_error(bad: float, temperature: float) -> None:
    row = np.zeros(V, np.float32)
    row[7] = bad
    with pytest.raises(TargetError, match="expected finite logits at output position 0"):
        sampler([1], temperature=temperature).draw(row)


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    row = np.full(V, -np.inf, np.float32)
    row[:4] = np.log(probabilities)
    made = sampler([1], temperature=1.0, seed=7)
    counts = np.bincount([made.draw(row) for _ in range(20_000)], minlength=4)
    expected = 20_000 * probabilities
    chi_square = float((((counts - expected) ** 2) / expected).sum())
    assert chi_square < 21.1  # 3 degrees of freedom: one fair sampler in 10,000 is above


def test_a_draw_depends_on_seed_sequence_and_position_alone() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (600, V)).astype(np.float32)
    config = GenerationConfig(temperature=1.0, seed=9)
    first, again = Sampler(config, [1], V), Sampler(config, [5, 6, 7], V)
    drawn = [first.draw(row) for row in rows]
    assert drawn[:300] != [again.draw(row) for row in rows[300:]], "another text before"
    assert drawn[300:] == [again.draw(row) for row in rows[300:]]
    for others in (Sampler(config, [1], V, sequence=1), sampler([1], temperature=1.0, seed=10)):
        assert drawn != [others.draw(row) for row in rows]


def test_a_draw_that_fails_uses_no_random_numbers() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (50, V)).astype(np.float32)
    steady, failing = (sampler([1], temperature=1.0, seed=3) for _ in range(2))
    for row in rows:
        with pytest.raises(TargetError):
            failing.draw(np.full(V, np.nan, np.float32))
        assert failing.draw(row) == steady.draw(row)


def test_rounding_flips_only_what_arrives_together() -> None:
    """Noise of 1e-3 in every logit, 4,000 draws over 4,096 tokens. Inverting the cumulative distribution flips 132."""
    generator = np.random.default_rng(5)
    size = 4096
    pair = [Sampler(GenerationConfig(temperature=1.0, top_p=0.95, seed=1), [0], size) for _ in range(2)]
    flipped = 0
    for _ in range(4_000):
        row = generator.normal(0, 2.5, size).astype(np.float32)
        noisy = row + generator.normal(0, 1e-3, size).astype(np.float32)
        flipped += pair[0].draw(row) != pair[1].draw(noisy)
    assert flipped <= 20


@pytest.mark.parametrize("controls", [{}, {"temperature": 0.6}, {"temperature": 1.4, "sequence": 2}])
def test_a_draft_that_is_right_foresees_every_draw(controls: dict[str, Any]) -> None:
    """With the target's own probabilities, three draws ahead; and no draw is another one for having been foreseen."""
    rows = np.random.default_rng(0).normal(0, 2, (60, V)).astype(np.float32)
    sequence = controls.pop("sequence", 0)
    config = GenerationConfig(**{"temperature": 1.0, "seed": 4} | controls)
    seeing, blind = (Sampler(config, [1], V, sequence) for _ in range(2))
    tokens = np.random.default_rng(1).permutation(V)[None].repeat(3, axis=0)
    for i in range(0, len(rows), 3):
        ahead: list[int] = []
        for step in range(3):
            log_probs = torch.log_softmax(torch.from_numpy(rows[i + step]), -1).numpy()[tokens]
            foreseen = seeing.foresee([ahead] * 3, tokens, log_probs)
            assert np.exp(foreseen).sum(axis=1) == pytest.approx(1, abs=1e-5)
            ahead.append(int(tokens[0, foreseen[0].argmax()]))
        assert ahead == [seeing.draw(row) for row in rows[i : i + 3]]
        assert ahead == [blind.draw(row) for row in rows[i : i + 3]]


def test_nothing_is_foreseen_of_a_greedy_text() -> None:
    log_probs = np.log(np.array([[0.5, 0.3]], np.float32))
    assert sampler([1]).foresee([[]], np.array([[3, 4]]), log_probs) is log_probs


def test_a_token_of_no_probability_is_never_drawn() -> None:
    row = np.full(V, -np.inf, np.float32)
    row[[1, 3]] = 0
    made = sampler([0], temperature=1.0)
    assert {made.draw(row) for _ in range(200)} == {1, 3}


SHAPES = st.fixed_dictionaries(
    {"temperature": st.sampled_from([1e-5, 0.3, 0.7, 1.0, 3.0, 100.0])},
    optional={
        "top_k": st.sampled_from([1, 2, 5, 40, 299, 1 << 20]),
        "top_p": st.sampled_from([1e-17, 0.3, 0.5, 0.9, 1 - 1e-12]),
        "min_p": st.sampled_from([0.01, 0.5, 1.0]),
        "typical_p": st.sampled_from([0.2, 0.9]),
        "repetition_penalty": st.just(1.3),
        "suppress_tokens": st.just(frozenset({0, 2})),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    SHAPES,
    st.sampled_from([3, 60, 64, 300, 1000]),
    st.sampled_from([0.0, 0.5, 3.0, 30.0, 1e37]),
    st.sampled_from([0, 1, 1000]),
    st.integers(0, 1 << 32),
)
def test_a_draw_is_the_race_of_all_tokens(
    controls: dict[str, Any], size: int, spread: float, per_unit: int, seed: int
) -> None:
    """The obvious version: every token's time, and its processed score. Rows are flat, steep, or full of ties."""
    rng = np.random.default_rng(seed)
    row = rng.normal(0, 1, size)
    row = (spread * (np.round(row * per_unit) / per_unit if per_unit else row)).astype(np.float32)
    row[rng.random(size) < rng.choice([0, 0.5])] = -np.inf
    row[1] = 0
    made = Sampler(GenerationConfig(seed=seed, **controls), [1, 2], size)
    for position in range(3):
        scores = made.processed(row)
        times = RandomTimes(seed, size).at(position).of(np.arange(size))
        expected = int((scores - np.log(times)).argmax())
        assert made.draw(row) == expected
        assert scores[expected] > -np.inf


@pytest.mark.parametrize("controls", [{}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.01}])
def test_most_tokens_are_left_out(controls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    whole = PositionTimes.of
    monkeypatch.setattr(PositionTimes, "of", lambda self, tokens: [asked.append(len(tokens)), whole(self, tokens)][1])
    made, rng = Sampler(GenerationConfig(temperature=0.7, **controls), [0], 20_000), np.random.default_rng(0)
    for _ in range(20):
        made.draw(rng.normal(0, 3, 20_000).astype(np.float32))
    assert sum(asked) / 20 < 2000


@pytest.mark.parametrize("controls", [{}, {"top_p": 0.9}, {"top_k": 2, "min_p": 0.1}])
def test_what_is_no_number_is_not_hidden_by_foresight(controls: dict[str, Any]) -> None:
    log_probs = np.array([[-1.0, np.nan, -2.0]], np.float32)
    foreseen = sampler([1], temperature=1.0, **controls).foresee([[]], np.array([[1, 2, 3]]), log_probs)
    assert np.isnan(foreseen).any()


def test_greedy_takes_the_first_of_equals() -> None:
    row = np.zeros(V, np.float32)
    row[[4, 9]] = 2
    assert sampler([0]).draw(row) == 4


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_of_the_processed_distribution(temperature: float) -> None:
    row = np.random.default_rng(1).normal(0, 2, V).astype(np.float32)
    made = sampler([0], temperature=temperature, top_k=8, logprobs=3, seed=1)
    token = made.draw(row)
    scores = torch.from_numpy(row).double()
    if temperature:
        scores = hf.TopKLogitsWarper(8)(None, scores[None] / temperature)[0]
    expected = torch.log_softmax(scores, -1)
    entry = made.logprobs[0]
    assert entry.logprob == pytest.approx(expected[token].item(), abs=1e-6)
    best = torch.topk(expected, 3)
    assert [t for t, _ in entry.top] == best.indices.tolist()
    assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-6)
