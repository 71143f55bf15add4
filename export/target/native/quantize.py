"""Matrices in fewer bits: what is stored of each, and how it is made of float32 numbers.

    w = (code - zero_point) * scale + offset          codes, and by group of inputs: scale, zero point, offset

Symmetric formats have neither zero point nor offset. A GGUF's blocks with a minimum (Q4_1, Q4_K) have an offset that no
whole zero point expresses. Everything works on a few rows at a time, on all cores.

Letters: O outputs (rows), I inputs, G groups of a row, S inputs of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from dovetail.export.sources.tensors import Matrix
from dovetail.runtime.hardware.threads import default_threads

_ROWS_BYTES = 8 << 20  # of float32 numbers that a thread works on at once: they stay in its cache
_SMALLEST, _LARGEST = np.float32(2.0**-14), np.float32(np.finfo(np.float16).max)  # float16's normal numbers
# By what part the range of a group of 4-bit codes may shrink: large weights are cut off, all others get finer steps.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """`codes` [O, G, S] of `bits` bits, int8 or uint8 numbers, not packed; the others [O, G]. Without `zero_points` and
    `offsets` there are none. Scales are float16 where groups are many, else float32.
    """

    codes: NDArray[np.int8] | NDArray[np.uint8]
    bits: int
    scales: NDArray[np.float16] | NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None = None
    offsets: Matrix | None = None

    @property
    def layout(self) -> tuple[object, ...]:
        """What two matrices must have in common to be stored as one."""
        parts = (self.zero_points is None, self.offsets is None)
        return self.codes.shape[2], self.codes.dtype, self.bits, self.scales.dtype, *parts

    def read(self) -> Matrix:
        """The numbers [O, I] that it stands for."""
        values = self.codes.astype(np.float32)
        if self.zero_points is not None:
            values -= self.zero_points[:, :, None]
        values *= self.scales[:, :, None].astype(np.float32)
        if self.offsets is not None:
            values += self.offsets[:, :, None]
        return values.reshape(len(values), -1)


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Matrices of one layout, one below the other."""
    assert len({part.layout for part in parts}) == 1, "matrices are stored as one only if they are stored alike"
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Quantized(
        np.concatenate([part.codes for part in parts]),
        parts[0].bits,
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zero_points) if zero_points else None,
        np.concatenate(offsets) if offsets else None,
    )


def quantize(
    read_rows: Callable[[int, int], Matrix],
    shape: tuple[int, int],
    *,
    bits: int,
    symmetric: bool,
    group_size: int | None = None,
) -> Quantized:
    """A matrix [O, I] rounded to nearest in groups of `group_size` inputs that divide it, None: whole rows.
    `read_rows(start, stop)` gives a part of its rows; it is called by several threads.

    8 bits: the largest weight of a group decides its scale. 4 bits: of a few scales the one with the least squared
    error, each fitted to its codes by least squares.
    """
    outputs, inputs = shape
    size, scale_type = group_size or inputs, np.float32 if group_size is None else np.float16
    assert inputs % size == 0, f"groups of {size} do not divide {inputs} inputs"
    make = _four_bits if bits == 4 else _symmetric_eight_bits if symmetric else _asymmetric_eight_bits
    step = max(1, _ROWS_BYTES // (4 * inputs))

    def part(start: int) -> Quantized:
        rows = read_rows(start, min(start + step, outputs))
        return make(rows.reshape(len(rows), -1, size), symmetric, scale_type)

    with ThreadPoolExecutor(default_threads()) as pool:
        return joined(list(pool.map(part, range(0, outputs, step))))


def _stored(scales: Matrix, scale_type: type) -> Matrix:
    """As they will be stored, so that codes are chosen for the very numbers that multiply them; never zero, and never
    less than asked for, so that no code is cut off.
    """
    if scale_type is np.float32:
        return scales.clip(np.float32(1e-30), None)
    halves = scales.clip(_SMALLEST, _LARGEST).astype(np.float16)
    above = np.nextafter(halves, np.float16(_LARGEST))
    too_small = halves.astype(np.float32) < np.minimum(scales, _LARGEST)
    return np.where(too_small, above, halves).astype(np.float32)


def _symmetric_eight_bits(grouped: Matrix, symmetric: bool, scale_type: type) -> Quantized:
    scales = _stored(np.abs(grouped).max(2) / np.float32(127), scale_type)
    codes = np.rint(grouped / scales[:, :, None]).clip(-127, 127).astype(np.int8)
    return Quantized(codes, 8, scales.astype(scale_type))


def _asymmetric_eight_bits(grouped: Matrix, symmetric: bool, scale_type: type) -> Quantized:
    low, high = grouped.min(2).clip(None, 0), grouped.max(2).clip(0, None)
    scales = _stored((high - low) / np.float32(255), scale_type)
    zero_points = np.rint(-low / scales).clip(0, 255)
    codes = np.rint(grouped / scales[:, :, None] + zero_points[:, :, None]).clip(0, 255).astype(np.uint8)
    return Quantized(codes, 8, scales.astype(scale_type), zero_points.astype(np.uint8))


def _four_bits(grouped: Matrix, symmetric: bool, scale_type: type) -> Quantized:
    low, high = grouped.min(2).clip(None, 0), grouped.max(2).clip(0, None)
    reach = np.maximum(-low / 8, high / 7) if symmetric else (high - low) / 15
    least, best = np.full(low.shape, np.inf, np.float32), None
    for shrink in map(np.float32, _SHRINKS):
        scales = _stored(reach * shrink, scale_type)
        zero_points = np.full_like(low, 8) if symmetric else np.rint(-low * shrink / scales).clip(0, 15)
        codes = np.rint(grouped / scales[:, :, None] + zero_points[:, :, None]).clip(0, 15)
        steps = codes - zero_points[:, :, None]
        squares = np.einsum("ogs,ogs->og", steps, steps)
        fitted = np.einsum("ogs,ogs->og", steps, grouped) / np.where(squares == 0, 1, squares)
        scales = np.where(fitted > 0, _stored(fitted, scale_type), scales)
        error = np.square(steps * scales[:, :, None] - grouped).sum(2)
        found, better = (codes, scales, zero_points), error < least
        best = (
            found
            if best is None
            else tuple(
                np.where(better[:, :, None] if new.ndim == 3 else better, new, old)
                for new, old in zip(found, best, strict=True)
            )
        )
        least = np.minimum(error, least)
    assert best is not None
    codes, scales, zero_points = best
    if symmetric:
        return Quantized((codes - 8).astype(np.int8), 4, scales.astype(scale_type))
    return Quantized(codes.astype(np.uint8), 4, scales.astype(scale_type), zero_points.astype(np.uint8))
