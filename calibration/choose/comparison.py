"""Policies beside each other on real texts, interleaved: what the prediction is held against, and what decides."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from dovetail.calibration.measure.pair import Pair, Run
from dovetail.runtime.policies.base import Policy


@dataclasses.dataclass(frozen=True, slots=True)
class Compared:
    """One policy's texts, in the order of the prompts."""

    runs: tuple[Run, ...]

    @property
    def tokens_per_second(self) -> float:
        """Over all texts together."""
        return 1e3 * sum(run.tokens for run in self.runs) / sum(run.ms for run in self.runs)

    @property
    def accept_length(self) -> float:
        """Accepted drafted tokens a round."""
        return sum(run.tokens for run in self.runs) / sum(run.rounds for run in self.runs) - 1

    def over(self, other: Compared) -> tuple[float, float]:
        """How many times faster than `other`: median over the texts, and its relative standard error (that of a median
        of normal logarithms).
        """
        ratios = [math.log(b.ms / b.tokens * a.tokens / a.ms) for a, b in zip(self.runs, other.runs, strict=True)]
        spread = statistics.stdev(ratios) if len(ratios) > 1 else math.inf
        return math.exp(statistics.median(ratios)), 1.25 * spread / math.sqrt(len(ratios))


def compare(
    pair: Pair,
    policies: Mapping[str, Policy],
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    new_tokens: int,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Compared]:
    """Continue every prompt with every policy, one after another, beginning with another one each time: a slow moment
    of the machine hits all alike.
    """
    names = list(policies)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    pair.generate(prompts[0], policies[names[-1]], temperature, 0, min(new_tokens, 16))  # the first calls are slow
    for seed, prompt in enumerate(prompts):
        for turn in range(len(names)):
            name = names[(seed + turn) % len(names)]
            runs[name].append(pair.generate(prompt, policies[name], temperature, seed, new_tokens))
            progress((seed * len(names) + turn + 1) / (len(prompts) * len(names)))
    return {name: Compared(tuple(found)) for name, found in runs.items()}
