"""Proves the processors against transformers' own on random rows, and that draws follow the processed distribution
and nothing but (seed, position).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dovetail.runtime.errors import UserError
from dovetail.runtime.sampling import Sampler, SamplingParams, processed, uniforms
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 300),
    st.floats(0.2, 3),
    st.integers(0, 50),
    st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.05, 1e-6]),
)
def test_processors_equal_transformers(seed: int, vocab: int, temperature: float, top_k: int, top_p: float) -> None:
    row = np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(row)[None].double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    np.testing.assert_allclose(processed(row, SamplingParams(temperature, top_k, top_p)), expected, atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    row = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=7))
    counts = np.bincount([sampler.draw(row, i) for i in range(20_000)], minlength=4)
    expected = 20_000 * np.array([0.5, 0.25, 0.15, 0.1])
    chi_square = float((((counts - expected) ** 2) / expected).sum())
    assert chi_square < 21.1  # 3 degrees of freedom: one fair sampler in 10,000 is above


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    assert np.array_equal(uniforms(1, 5000)[:300], uniforms(1, 300))
    assert len(np.unique([uniforms(seed, 50) for seed in range(20)])) == 1000
    row = np.random.default_rng(0).normal(0, 1, 100).astype(np.float32)
    params = SamplingParams(temperature=1.0, seed=9)
    forwards, backwards = Sampler(params), Sampler(params)
    positions = [0, 1, 255, 256, 257, 3000]
    assert [forwards.draw(row, i) for i in positions] == [backwards.draw(row, i) for i in positions[::-1]][::-1]


def test_a_token_of_no_probability_is_never_drawn() -> None:
    row = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0))
    sampler._uniforms = np.array([0.0, 0.5, 1 - 2**-53, 1.0])  # 1.0: what rounding could make of the last point
    assert {sampler.draw(row, i) for i in range(4)} == {1, 3}


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(SamplingParams()).draw(np.array([0, 2, 2, 1], np.float32), 0) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected"):
        SamplingParams(**wrong)  # type: ignore[arg-type]
