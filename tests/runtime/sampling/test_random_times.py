"""Proves the random times of the draws: exponential, independent of position, seed and token, and the same in whatever
order and company they are looked at; and that the earliest is known.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.random_times import PositionTimes, RandomTimes
from dovetail.runtime.sampling.sampler import Sampler

V = 4000


def row(key: int, position: int, size: int = V) -> np.ndarray:
    """[V] from a stream that has looked at nothing else."""
    return RandomTimes(key, size).at(position).of(np.arange(size))


def rows(key: int, positions: range) -> np.ndarray:
    """[positions, V]"""
    return np.stack([row(key, position) for position in positions])


def distance(sample: np.ndarray) -> float:
    """Kolmogorov and Smirnov's, of the exponential distribution, times the root of the sample's size: above 2.3 in one
    of 25,000 fair samples.
    """
    expected = 1 - np.exp(-np.sort(sample, axis=None))
    steps = np.arange(sample.size + 1) / sample.size
    apart = np.maximum(np.abs(expected - steps[1:]), np.abs(expected - steps[:-1])).max()
    return float(apart * np.sqrt(sample.size))


def test_times_are_exponential() -> None:
    times = rows(7, range(50))
    assert (times > 0).all()
    assert distance(times) < 2.3
    # So is a token's time over the positions, and the first time over all tokens, V times as fast.
    assert distance(np.stack([row(key, position, 8) for key in range(20) for position in range(50)])) < 2.3
    assert distance(V * np.stack([rows(key, range(20)).min(axis=1) for key in range(20)])) < 2.3


def test_positions_keys_and_tokens_are_independent() -> None:
    """No two streams share a number, and none says anything of another: neither of the next position, nor of the next
    key, nor of the next text of a request, nor of the same stream some tokens on.
    """
    keys = [0, 1, 2, 1 << 63, (1 << 64) - 1, 1 << 64, (1 << 64) + 1, 2 << 64]
    streams = {(key, position): row(key, position) for key in keys for position in (0, 1, 2, 500, 1 << 31)}
    assert len(np.unique(np.concatenate(list(streams.values())))) == V * len(streams)
    apart = [np.corrcoef(a, b)[0, 1] for a, b in itertools.combinations(streams.values(), 2)]
    apart += [np.corrcoef(row[:-lag], row[lag:])[0, 1] for row in streams.values() for lag in (1, 2, 4)]
    assert np.abs(apart).max() * np.sqrt(V) < 5  # one of a thousand such sets of fair samples is above
    assert abs(np.mean(apart)) * np.sqrt(V * len(apart)) < 4


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(0, 15), max_size=20)), min_size=1, max_size=60))
def test_any_order_and_company_gives_the_same(looks: list[tuple[int, list[int]]]) -> None:
    times = RandomTimes(11, 16)
    for position, tokens in looks:
        got = times.at(position).of(np.array(tokens, np.int64))
        np.testing.assert_array_equal(got, row(11, position, 16)[tokens])


def test_the_earliest_is_known_and_each_tokens_as_often() -> None:
    counts = np.zeros(8)
    for position in range(4000):
        times = RandomTimes(5, 8).at(position)
        everyones = times.of(np.arange(8))
        assert times.earliest == everyones.min()
        assert times.first_token == everyones.argmin()
        counts[times.first_token] += 1
    chi_square = float(((counts - 500) ** 2 / 500).sum())
    assert chi_square < 29.9  # 7 degrees of freedom: one fair race in 10,000 is above


def undone(bits: int) -> int:
    """The number of which SplitMix64 makes `bits`."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        bits ^= bits >> shift ^ bits >> 2 * shift
        bits = bits * pow(factor, -1, 1 << 64) % (1 << 64)
    return bits


@pytest.mark.parametrize("bits", [0, (1 << 64) - 1])
def test_no_time_is_nothing_or_without_end(bits: int) -> None:
    """A time of 0 would be before all probabilities, and one without end behind what is impossible."""
    times = PositionTimes(0.0, 1, undone(bits)).of(np.array([0]))
    assert 1e-17 < times[0] < 40
    assert times[0] < 1e-15 or times[0] > 36


def test_looking_ahead_changes_no_draw() -> None:
    """However far, and again after the text was taken back."""
    config = GenerationConfig(temperature=1.0, seed=3)
    logits = np.random.default_rng(0).normal(0, 2, (40, 50)).astype(np.float32)
    plain, looking = Sampler(config, [1], 50), Sampler(config, [1], 50)
    drawn = [plain.draw(row) for row in logits]
    tokens, log_probs = np.arange(8)[None], np.zeros((1, 8), np.float32)
    for i, row in enumerate(logits):
        for depth in (0, 30, 3):
            looking.foresee([[1] * depth], tokens, log_probs)
        assert looking.draw(row) == drawn[i]
        if i % 5 == 4:
            looking.rewind(i - 2)
            assert [looking.draw(row) for row in logits[i - 2 : i + 1]] == drawn[i - 2 : i + 1]


def test_paths_decide_the_position_alone() -> None:
    """Behind paths of one length the same race is run, whatever tokens they hold, and each length has its own."""
    sampler = Sampler(GenerationConfig(temperature=1.0, seed=5), [1], 50)
    tokens, log_probs = np.arange(50)[None], np.full((1, 50), -np.log(50), np.float32)
    first = [int(sampler.foresee([path], tokens, log_probs)[0].argmax()) for path in ([], [3], [4], [3, 3], [9, 8])]
    times = RandomTimes(5, 50)
    assert first == [times.at(depth).first_token for depth in (0, 1, 1, 2, 2)]
