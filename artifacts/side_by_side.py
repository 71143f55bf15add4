"""Plain decoding beside Dovetail: the same texts made both ways in turns, by one pipeline, and what each way cost."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dovetail.runtime.decoding.generation import Generation
    from dovetail.runtime.pipeline import Pipeline, Prompt

MOST_TURNS = 5
SEED = 7


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What some texts cost, sums over them. The first token of a text comes with its prompt and is not counted.

    a round of 13 ms  =  9 ms the target's pass  +  3 ms the draft's calls  +  1 ms the rest
    """

    tokens: int
    passes: int
    decode_ms: float
    verify_ms: float
    draft_ms: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding; reading the prompts is not counted."""
        return 1e3 * self.tokens / self.decode_ms

    @property
    def tokens_per_pass(self) -> float:
        """Accepted tokens of a round and its bonus token; 1 in plain decoding."""
        return self.tokens / self.passes


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Both ways at one temperature."""

    temperature: float
    plain: Cost
    ours: Cost
    same: bool  # all texts, token by token

    @property
    def speedup(self) -> float:
        """How many times as fast as plain decoding."""
        return self.ours.tokens_per_second / self.plain.tokens_per_second


def compare(
    pipe: Pipeline, prompts: Sequence[Prompt], temperatures: Sequence[float], *, max_new_tokens: int, seconds: float
) -> list[Comparison]:
    """Make every text by both ways, again and again for about `seconds`, once at least; times are medians."""
    from dovetail.runtime.policies.base import Policy

    texts = [(temperature, number) for temperature in temperatures for number in range(len(prompts))]
    plain: dict[tuple[float, int], list[Generation]] = {text: [] for text in texts}
    ours: dict[tuple[float, int], list[Generation]] = {text: [] for text in texts}
    end = time.monotonic() + seconds
    for turn in range(MOST_TURNS):
        for temperature, number in texts:
            if turn and time.monotonic() > end:
                break
            ways = [(plain, Policy("plain")), (ours, None)]
            for runs, policy in ways if (turn + number) % 2 == 0 else reversed(ways):
                stream = pipe.stream(
                    prompts[number],
                    temperature=temperature,
                    seed=SEED,
                    max_new_tokens=max_new_tokens,
                    policy=policy,
                )
                runs[temperature, number].append(stream.finish())
    return [_comparison(temperature, plain, ours) for temperature in temperatures]


def _comparison(
    temperature: float,
    plain: dict[tuple[float, int], list[Generation]],
    ours: dict[tuple[float, int], list[Generation]],
) -> Comparison:
    texts = [text for text in plain if text[0] == temperature]
    same = all(run.token_ids == plain[text][0].token_ids for text in texts for run in plain[text] + ours[text])
    return Comparison(temperature, _cost([plain[text] for text in texts]), _cost([ours[text] for text in texts]), same)


def _cost(texts: Sequence[Sequence[Generation]]) -> Cost:
    """Of texts, each of which was made several times."""
    return Cost(
        tokens=sum(len(runs[0].token_ids) - 1 for runs in texts),
        passes=sum(runs[0].totals.rounds for runs in texts),
        decode_ms=sum(statistics.median(run.decode_ms for run in runs) for runs in texts),
        verify_ms=sum(statistics.median(run.totals.verify_ms for run in runs) for runs in texts),
        draft_ms=sum(statistics.median(run.totals.draft_ms for run in runs) for runs in texts),
    )


def table(comparisons: Sequence[Comparison]) -> list[str]:
    """Its lines: two columns a temperature."""
    costs = [cost for one in comparisons for cost in (one.plain, one.ours)]
    temperatures = (f"T = {one.temperature:g}" for one in comparisons)
    return [
        f"{'':<24}" + "".join(f"{temperature:>24}" for temperature in temperatures),
        f"{'':<24}" + f"{'plain':>12}{'Dovetail':>12}" * len(comparisons),
        f"{'tokens/s':<24}" + "".join(f"{cost.tokens_per_second:>12.1f}" for cost in costs),
        f"{'passes over the weights':<24}" + "".join(f"{cost.passes:>12}" for cost in costs),
        f"{'tokens a pass':<24}" + "".join(f"{cost.tokens_per_pass:>12.2f}" for cost in costs),
    ]


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One line: how fast, and whether the texts are the same."""
    speeds = ", ".join(f"{one.speedup:.2f} times as fast at T = {one.temperature:g}" for one in comparisons)
    same = all(one.same for one in comparisons)
    texts = "the texts are the same, token by token" if same else "THE TEXTS ARE NOT THE SAME, which is a bug"
    return f"Against plain decoding Dovetail is {speeds}; {texts}."


def reasons(comparisons: Sequence[Comparison]) -> list[str]:
    """A line for each temperature at which plain decoding is faster: what a round costs here, and what it brings."""
    return [_reason(one) for one in comparisons if one.speedup < 1]


def _reason(one: Comparison) -> str:
    plain_ms = one.plain.decode_ms / one.plain.passes
    verify, draft, whole = (
        ms / one.ours.passes / plain_ms for ms in (one.ours.verify_ms, one.ours.draft_ms, one.ours.decode_ms)
    )
    return (
        f"Slower at T = {one.temperature:g}: on this machine a round costs {whole:.2f} plain ones (the target's pass "
        f"{verify:.2f}, the draft {draft:.2f}, the rest {whole - verify - draft:.2f}) and brings "
        f"{one.ours.tokens_per_pass:.2f} tokens."
    )
