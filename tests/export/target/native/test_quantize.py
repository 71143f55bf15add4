"""Proves that what is stored of a matrix stands for the numbers it should: a GGUF's blocks for the very numbers that
the `gguf` package reads, rounded weights for the nearest codes of their scales, and 4 bits for less error than plain
rounding.
"""

from __future__ import annotations

import gguf
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dovetail.export.sources.tensors import Matrix
from dovetail.export.target.native import quantize as quantizing
from dovetail.export.target.native.gguf_blocks import KEPT, read_blocks
from dovetail.export.target.native.quantize import Quantized, joined, quantize

OUTPUTS, INPUTS = 48, 96


def weights(seed: int = 0, spread: float = 1.0) -> Matrix:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((OUTPUTS, INPUTS)) * np.exp(spread * rng.standard_normal((OUTPUTS, 1)))
    return rows.astype(np.float32)


def stored(weight: Matrix, bits: int, symmetric: bool, group_size: int | None = None) -> Quantized:
    return quantize(
        lambda start, stop: weight[start:stop],
        (OUTPUTS, INPUTS),
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
    )


@pytest.mark.parametrize("kind", KEPT)
def test_blocks_are_the_numbers_that_gguf_reads(kind: str) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(len(kind))
    blocks = rng.integers(0, 256, (16, 3, block_bytes)).astype(np.uint8)
    for place in (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,):  # float16 numbers, which must be sound
        halves = rng.standard_normal((16, 3)).astype(np.float16)
        blocks[..., place : place + 2] = np.ascontiguousarray(halves)[..., None].view(np.uint8)
    rows = blocks.reshape(16, -1)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    quantized = read_blocks(kind, rows)
    assert quantized.codes.dtype == np.int8
    limit = 1 << (quantized.bits - 1)
    assert -limit <= quantized.codes.min() < quantized.codes.max() < limit
    np.testing.assert_allclose(quantized.read(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert expected.shape == (16, 3 * block_size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32, 16])
def test_eight_bits_are_off_by_half_a_step(symmetric: bool, group_size: int | None) -> None:
    weight = weights()
    quantized = stored(weight, 8, symmetric, group_size)
    error = np.abs(quantized.read() - weight).reshape(OUTPUTS, -1, group_size or INPUTS).max(2)
    assert (error <= 0.5001 * quantized.scales.astype(np.float32)).all()
    assert quantized.scales.dtype == (np.float32 if group_size is None else np.float16)
    assert (quantized.zero_points is None) == symmetric


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_beat_plain_rounding(symmetric: bool) -> None:
    weight = weights(1)
    quantized = stored(weight, 4, symmetric, 32)
    codes = quantized.codes.astype(int)
    assert (codes.min(), codes.max()) == ((-8, 7) if symmetric else (0, 15))
    grouped = weight.reshape(OUTPUTS, -1, 32)
    if symmetric:
        scale = np.abs(grouped).max(2, keepdims=True) / 7
        plain = np.rint(grouped / scale).clip(-8, 7) * scale
    else:
        low, high = grouped.min(2, keepdims=True).clip(None, 0), grouped.max(2, keepdims=True).clip(0, None)
        scale = (high - low) / 15
        zero = np.rint(-low / scale)
        plain = (np.rint(grouped / scale + zero).clip(0, 15) - zero) * scale
    error, plain_error = (
        np.square(values - weight).sum() for values in (quantized.read(), plain.reshape(weight.shape))
    )
    assert error < 0.96 * plain_error


@hypothesis.given(st.integers(0, 1000), st.sampled_from([4, 8]), st.booleans(), st.sampled_from([None, 32]))
@hypothesis.settings(max_examples=25)
def test_rows_do_not_depend_on_how_many_are_rounded_at_once(
    seed: int, bits: int, symmetric: bool, group_size: int | None
) -> None:
    weight = weights(seed, spread=4.0)
    whole = stored(weight, bits, symmetric, group_size)
    before, quantizing._ROWS_BYTES = quantizing._ROWS_BYTES, 4 * INPUTS * 5
    try:
        parts = stored(weight, bits, symmetric, group_size)
    finally:
        quantizing._ROWS_BYTES = before
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.scales, parts.scales)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False)])
@pytest.mark.parametrize("group_size", [None, 32])
def test_nothing_becomes_infinite_or_undefined(bits: int, symmetric: bool, group_size: int | None) -> None:
    weight = weights()
    weight[0], weight[1], weight[2, 5] = 0, 1e-9, 3e4
    weight[3] = -np.abs(weight[3])
    values = stored(weight, bits, symmetric, group_size).read()
    assert np.isfinite(values).all()
    assert not values[0].any()
    assert abs(values[2, 5] - 3e4) < 3e4 / (15 if bits == 4 else 127)


def test_matrices_of_one_layout_are_joined() -> None:
    first, second = (stored(weights(seed), 4, symmetric=False, group_size=32) for seed in (1, 2))
    both = joined([first, second])
    np.testing.assert_array_equal(both.read(), np.concatenate([first.read(), second.read()]))
    with pytest.raises(AssertionError, match="stored alike"):
        joined([first, stored(weights(), 8, symmetric=True)])
