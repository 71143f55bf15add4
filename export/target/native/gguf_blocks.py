"""The blocks of a GGUF as codes, scales and offsets: the very numbers that llama.cpp reads, in 4 or 8 bits.

Layouts as ggml defines them. Blocks with scales finer than 32 weights (Q2_K, Q3_K, Q6_K, IQ ...) are not here: OpenVINO
reads groups of 32 at the speed of small integers, and no finer ones.

Letters: O rows, B blocks of a row, G groups of 32 weights of a row, S = 32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from dovetail.export.target.native.quantize import Quantized

SIZE = 32
Bytes = NDArray[np.uint8]


def _halves(blocks: Bytes, start: int) -> NDArray[np.float32]:
    """The float16 number at byte `start` of each block, [O, B]."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(quants: Bytes) -> Bytes:
    """[..., 16] bytes -> [..., 32] codes: the low halves first."""
    return np.concatenate([quants & 15, quants >> 4], axis=-1)


def _fifth_bits(high: Bytes) -> Bytes:
    """[..., 4] bytes, a bit a weight -> [..., 32], 16 where it is set."""
    return np.unpackbits(high, axis=-1, bitorder="little") << np.uint8(4)


def _float16(scales: NDArray[np.float32]) -> NDArray[np.float16]:
    return scales.astype(np.float16)


def _q4_0(blocks: Bytes) -> Quantized:
    codes = _nibbles(blocks[..., 2:]).astype(np.int8) - 8
    return Quantized(codes, 4, _float16(_halves(blocks, 0)))


def _q4_1(blocks: Bytes) -> Quantized:
    scales, minimum = _halves(blocks, 0), _halves(blocks, 2)
    return _shifted(_nibbles(blocks[..., 4:]), scales, minimum)


def _q5_0(blocks: Bytes) -> Quantized:
    codes = (_nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])).astype(np.int8) - 16
    return Quantized(codes, 8, _float16(_halves(blocks, 0)))


def _q5_1(blocks: Bytes) -> Quantized:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return _shifted(codes, _halves(blocks, 0), _halves(blocks, 2), bits=8)


def _q8_0(blocks: Bytes) -> Quantized:
    return Quantized(np.ascontiguousarray(blocks[..., 2:]).view(np.int8), 8, _float16(_halves(blocks, 0)))


def _q4_k(blocks: Bytes) -> Quantized:
    scales, minimum = _k_scales(blocks)
    return _shifted(_k_nibbles(blocks[..., 16:]), scales, minimum)


def _q5_k(blocks: Bytes) -> Quantized:
    scales, minimum = _k_scales(blocks)
    high = np.unpackbits(blocks[..., 16:48, None], axis=-1, bitorder="little")  # [O, B, 32, 8]: bit g is group g's
    fifth = high.swapaxes(-1, -2).reshape(len(blocks), -1, SIZE) << np.uint8(4)
    return _shifted(_k_nibbles(blocks[..., 48:]) | fifth, scales, minimum, bits=8)


def _k_nibbles(quants: Bytes) -> Bytes:
    """[O, B, 128] bytes -> [O, G, 32] codes: 32 bytes hold the low halves of one group, the high ones of the next."""
    pairs = quants.reshape(*quants.shape[:-1], 4, 1, SIZE)
    return np.concatenate([pairs & 15, pairs >> 4], axis=-2).reshape(len(quants), -1, SIZE)


def _k_scales(blocks: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(scale, minimum) [O, G] of the 8 groups of each block: 6 bits each, in 12 bytes, times a number of the block."""
    packed = blocks[..., 4:16]
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=-1)
    whole = (_halves(blocks, at)[..., None] * part for at, part in ((0, scales), (2, minima)))
    scale, minimum = (part.astype(np.float32).reshape(len(blocks), -1) for part in whole)
    return scale, -minimum


def _shifted(codes: Bytes, scales: NDArray[np.float32], minimum: NDArray[np.float32], bits: int = 4) -> Quantized:
    """w = code * scale + minimum, with signed codes: products of small integers want them around zero."""
    middle = 8 if bits == 4 else 16
    signed = codes.astype(np.int8) - np.int8(middle)
    return Quantized(signed, bits, scales, None, minimum + np.float32(middle) * scales)


_READERS: Mapping[str, tuple[int, Callable[[Bytes], Quantized]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
}
KEPT = tuple(_READERS)
"""The block types that are taken as they are."""


def read_blocks(kind: str, rows: Bytes) -> Quantized:
    """The rows [O, bytes] of a matrix in blocks of `kind`, one of `KEPT`."""
    size, read = _READERS[kind]
    return read(rows.reshape(len(rows), -1, size))
