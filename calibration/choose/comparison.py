"""Policies beside each other on real texts, interleaved: what the prediction is held against, and what decides."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

from dovetail.calibration.measure.pair import Pair, Run
from dovetail.runtime.policies.base import Policy

_FEWEST_PROMPTS = 3


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
        """How many times faster than `other` over all texts together, and the relative standard error of that: by how
        much each text draws the ratio its way (the linearised error of a ratio of sums, Cochran 1977, 6.4).
        """
        ratio, count = self.tokens_per_second / other.tokens_per_second, len(self.runs)
        if count == 1:
            return ratio, math.inf
        pulls = [a - b for a, b in zip(self._pulls(), other._pulls(), strict=True)]
        return ratio, math.sqrt(count / (count - 1) * sum(pull**2 for pull in pulls))

    def _pulls(self) -> list[float]:
        """Each text's share of the tokens beyond its share of the time."""
        tokens, ms = sum(run.tokens for run in self.runs), sum(run.ms for run in self.runs)
        return [run.tokens / tokens - run.ms / ms for run in self.runs]


def compare(
    pair: Pair,
    policies: Mapping[str, Policy],
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    new_tokens: int,
    texts: int,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Compared]:
    """Continue one prompt after another with every policy, beginning with another one each time: a slow moment of the
    machine hits all alike. Texts end where they end, so there are more of them until they have as many tokens as
    `texts` of `new_tokens`; but none is begun after `seconds`, except for the first three.
    """
    names = list(policies)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    pair.generate(prompts[0], policies[names[-1]], temperature, 0, min(new_tokens, 16))  # the first calls are slow
    begun, made, wanted = time.perf_counter(), 0, texts * (new_tokens - 1) * len(names)
    for seed, prompt in enumerate(prompts):
        if made >= wanted or (seed >= _FEWEST_PROMPTS and time.perf_counter() - begun > seconds):
            break
        for turn in range(len(names)):
            name = names[(seed + turn) % len(names)]
            runs[name].append(pair.generate(prompt, policies[name], temperature, seed, new_tokens))
            made += runs[name][-1].tokens
            progress(min(made / wanted, 1.0))
    progress(1.0)
    return {name: Compared(tuple(found)) for name, found in runs.items()}
