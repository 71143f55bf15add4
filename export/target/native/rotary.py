"""Rotary position embedding: which frequencies and which scale a config's `rope_parameters` mean.

Kinds: default; linear; dynamic, which changes nothing within the model's context; llama3; yarn (arXiv 2309.00071);
longrope (arXiv 2402.13753); factors, each frequency's divisor, which a GGUF file has in place of llama3's parameters.
Figures as transformers computes them.

Letters: E size of the rotated part of a head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import UserError

_OLD_NAMES = {"type": "rope_type"}  # of `rope_scaling`


@dataclasses.dataclass(frozen=True, slots=True)
class Rotary:
    """`frequencies` are radians a position, E / 2 of them; `scale` multiplies cosine and sine.

    `long_frequencies` replace them in a text longer than `border` tokens (longrope): in all of it, so that its keys
    must be computed anew when it crosses the border.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    border: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.scale, *self.frequencies, *(self.long_frequencies or ()))
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("frequencies: they must be positive and finite")

    @property
    def size(self) -> int:
        """E: how many of a head's entries are rotated."""
        return 2 * len(self.frequencies)


def read_rotary(parameters: Mapping[str, Any], head_dim: int, context: int, where: object) -> Rotary:
    """What `parameters` (see `rope_parameters`) mean for heads of `head_dim` and a context of `context` tokens.

    Raises `UserError` for a kind that is not known, and where numbers are missing.
    """
    rope = {_OLD_NAMES.get(name, name): value for name, value in parameters.items()}
    kind = rope.get("rope_type") or "default"
    if kind == "mrope":
        kind = "default"  # of a vision model: a text's three positions are one
    try:
        with np.errstate(all="ignore"):  # what comes of bad numbers is looked at in the end
            share = float(rope.get("partial_rotary_factor") or 1.0)
            if not 0 < share <= 1:
                raise ValueError(f"partial_rotary_factor {share}")
            size = int(head_dim * share)
            theta = float(rope.get("rope_theta") or 10000.0)
            frequencies = 1.0 / theta ** (np.arange(0, size, 2) / size)
            if kind in ("default", "dynamic"):
                return _rotary(frequencies)
            if kind == "linear":
                return _rotary(frequencies / float(rope["factor"]))
            if kind == "llama3":
                return _rotary(frequencies / llama3_factors(frequencies, rope))
            if kind == "factors":
                return _rotary(frequencies / _factors(rope, "factors", frequencies))
            if kind == "yarn":
                return _yarn(frequencies, theta, rope, context)
            if kind == "longrope":
                return _longrope(frequencies, rope, context)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"expected the numbers of rope_type {kind!s:.40} in the config of {where}, got no usable {error!s:.80}; "
            f"copy the checkpoint again"
        ) from None
    raise UserError(
        f"expected a rope_type of default, linear, dynamic, llama3, yarn, longrope, factors, got {kind!r:.40} in the "
        f"config of {where}; choose another checkpoint"
    )


def _rotary(frequencies: NDArray[np.float64], scale: float = 1.0) -> Rotary:
    return Rotary(tuple(map(float, frequencies)), float(scale))


def llama3_factors(frequencies: NDArray[np.float64], rope: Mapping[str, Any]) -> NDArray[np.float64]:
    """What Llama 3 divides `frequencies` [E / 2] by: 1 for short waves, `factor` for long ones, between them a ramp."""
    low, high, factor = (float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clip(0, 1)
    return 1 / (share + (1 - share) / factor)


def _yarn(frequencies: NDArray[np.float64], theta: float, rope: Mapping[str, Any], context: int) -> Rotary:
    size, original = 2 * len(frequencies), rope.get("original_max_position_embeddings") or context
    factor = float(rope.get("factor") or context / original)

    def place(turns: float) -> float:  # of the pair that turns so often within the original context
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(rope.get("beta_fast") or 32), place(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    slow = ((np.arange(size // 2) - low) / (high - low or 0.001)).clip(0, 1)
    scale = rope.get("attention_factor")
    if scale is None:
        parts = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = _magnitude(factor, parts[0]) / _magnitude(factor, parts[1]) if all(parts) else _magnitude(factor, 1)
    return _rotary(frequencies * (slow / factor + 1 - slow), scale)


def _magnitude(factor: float, weight: Any) -> float:
    return 0.1 * float(weight) * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(frequencies: NDArray[np.float64], rope: Mapping[str, Any], context: int) -> Rotary:
    border = int(rope.get("original_max_position_embeddings") or context)
    short, long = (_factors(rope, name, frequencies) for name in ("short_factor", "long_factor"))
    factor = float(rope.get("factor") or context / border)
    scale = rope.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(border)) if factor > 1 else 1.0
    if border >= context:
        return _rotary(frequencies / short, scale)
    return Rotary(tuple(frequencies / short), float(scale), tuple(map(float, frequencies / long)), border)


def _factors(rope: Mapping[str, Any], name: str, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    factors = np.array(rope[name], np.float64)
    if factors.shape != frequencies.shape:
        raise ValueError(f"{name} of {factors.size} numbers, not {frequencies.size}")
    return factors
