"""Drawing the target's next token: processors on one row of logits, then one uniform number per output position.

Output position i of a text uses the uniform number made from (seed, i) and nothing else. So with `exact` numerics the
same seed gives the same tokens with any draft, any tree, or none. Letters: V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from dovetail.runtime.errors import UserError
from dovetail.runtime.tree import Float32s

MAX_SEED = (1 << 64) - 1


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """Names, order and meaning as in transformers' `generate`. `temperature == 0` is greedy; `top_k == 0` and `top_p
    == 1` are off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: expected a number >= 0, got {self.temperature}; 0 decodes greedily")
        if self.top_k < 0:
            raise UserError(f"top_k: expected a whole number >= 0, got {self.top_k}; 0 switches it off")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a number above 0 and at most 1, got {self.top_p}; 1 switches it off")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed: expected a whole number from 0 to {MAX_SEED}, got {self.seed}")


class Sampler:
    """Draws tokens from processed target rows."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._uniforms = uniforms(params.seed, 256)

    def at(self, position: int) -> Callable[[Float32s, list[int]], int]:
        """The draws of a round whose first token has output position `position`, in the form that `accept` takes."""
        return lambda logits, drawn: self.draw(logits, position + len(drawn))

    def draw(self, logits: Float32s, position: int) -> int:
        """The token at output position `position` from the target's row `logits` [V]."""
        if self._params.temperature == 0:
            return int(logits.argmax())
        probabilities = processed(logits, self._params)
        cumulative = np.cumsum(probabilities)
        point = self._uniform(position) * cumulative[-1]
        # side="right": a token of probability 0 spans nothing and cannot be drawn.
        token = int(np.searchsorted(cumulative, point, side="right"))
        return min(token, int(np.flatnonzero(probabilities)[-1]))  # point == cumulative[-1] by rounding

    def _uniform(self, position: int) -> float:
        if position >= len(self._uniforms):
            self._uniforms = uniforms(self._params.seed, 2 * position)
        return float(self._uniforms[position])


def processed(logits: Float32s, params: SamplingParams) -> npt.NDArray[np.float64]:
    """[V] probabilities after temperature, top-k and top-p, in this order; `params.temperature` must be above 0."""
    scores = logits.astype(np.float64) / params.temperature
    if 0 < params.top_k < len(scores):
        threshold = np.partition(scores, -params.top_k)[-params.top_k]
        scores[scores < threshold] = -np.inf
    probabilities: npt.NDArray[np.float64] = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        # The smallest set of most likely tokens whose mass reaches top_p (Holtzman et al. 2019, arXiv 1904.09751).
        order = np.argsort(probabilities, kind="stable")
        dropped = np.cumsum(probabilities[order]) <= 1 - params.top_p
        dropped[-1] = False
        probabilities[order[dropped]] = 0
        probabilities /= probabilities.sum()
    return probabilities


def uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """[count] numbers in [0, 1), one per output position: the stream of Philox (Salmon et al. 2011) keyed by the seed.

    A longer stream starts with the shorter one.
    """
    return np.random.Generator(np.random.Philox(key=seed)).random(count)
