"""One calibration from end to end: measure costs, record acceptance, choose, compare, and make the profile."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from dovetail.calibration.choose import search
from dovetail.calibration.choose.comparison import Compared, compare
from dovetail.calibration.choose.search import Candidate, Candidates
from dovetail.calibration.measure import acceptance
from dovetail.calibration.measure.acceptance import TextRecords
from dovetail.calibration.measure.latency import CONTEXTS, NODES, QUICK_CONTEXTS, QUICK_NODES, measure
from dovetail.calibration.measure.pair import Pair
from dovetail.calibration.measure.price_tables import Latency
from dovetail.calibration.measure.prompts import Prompts
from dovetail.runtime.hardware.machine import Machine
from dovetail.runtime.policies.host_profile import PROFILE_VERSION, Choice, Engines, HostProfile
from dovetail.runtime.trees.shape import TreeShape

MAX_ERROR = 0.15  # of the median times: above it nothing can be decided
GAIN = 1.02  # over plain decoding below which the draft isn't worth its memory
ADAPTIVE_GAIN = 0.97  # over the best tree that is always the same: one that grows follows texts unlike these, too
TEMPERATURES = (0.0, 1.0)
_MODEL_ERROR = 0.1  # of a foretold ratio: what the model of costs leaves out
_LEAST_ERROR = 0.02  # of a measured one, however well its texts agree

Progress = Callable[[str, float], None]
"""Told what is being done, and the share of it that is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    latency_s: float = 60.0
    nodes: tuple[int, ...] = NODES
    contexts: tuple[int, ...] = CONTEXTS
    questions: int = 64  # of a file; most are only needed where answers are short
    conversations: int = 24
    passages: int = 12
    passage_tokens: int = 96
    new_tokens: int = 96
    positions: int = 300
    records_s: float = 40.0
    compared_texts: int = 5
    compared_tokens: int = 96
    compared_s: float = 90.0


QUICK = Effort(
    latency_s=12.0,
    nodes=QUICK_NODES,
    contexts=QUICK_CONTEXTS,
    questions=32,
    conversations=12,
    passages=6,
    passage_tokens=64,
    new_tokens=64,
    positions=150,
    records_s=10.0,
    compared_texts=3,
    compared_tokens=48,
    compared_s=30.0,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What was found at one temperature."""

    temperature: float
    texts: list[TextRecords]
    candidates: Candidates
    compared: dict[str, Compared]
    chosen: Candidate
    choice: Choice

    @property
    def texts_summary(self) -> str:
        """How much it rests on, in words."""
        timed = self.compared["plain"].runs
        return (
            f"{sum(map(len, self.texts))} tokens of {len(self.texts)} texts recorded, "
            f"{sum(run.tokens for run in timed)} of {len(timed)} timed"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """All that was measured, and what follows. `too_noisy` says why nothing was decided."""

    prompts: Prompts
    latency: Latency
    decisions: tuple[Decision, ...]
    too_noisy: str | None

    @property
    def text(self) -> str:
        """What was recorded and timed, in words."""
        given = len(self.prompts.token_ids)
        used = (len(one.texts) + len(one.compared["plain"].runs) for one in self.decisions)
        return self.prompts.described(min(given, max(used, default=given)))


def calibrate(
    pair: Pair,
    prompts: Prompts,
    *,
    effort: Effort,
    default: TreeShape,
    temperatures: Sequence[float] = TEMPERATURES,
    progress: Progress = lambda what, share: None,
) -> Calibration:
    """Measure `pair` and choose a policy per temperature. `prompts` fill at most half of its context; `default`: the
    artifact's own tree, compared with, too. Raises `UserError` where texts end too soon.
    """
    # What does not fit a short context is taken from the texts' length, which everything can live with.
    new_tokens = min(effort.new_tokens, pair.context_length // 4)
    latency = measure(
        pair,
        [token for prompt in prompts.token_ids for token in prompt],
        seconds=effort.latency_s,
        nodes=effort.nodes,
        contexts=effort.contexts,
        progress=functools.partial(progress, "timing the target and the draft"),
    )
    if latency.error > MAX_ERROR:
        reason = (
            f"the times of a pass are uncertain by {latency.error:.0%} (at most {MAX_ERROR:.0%} is of use): this "
            "machine is too busy to decide anything; stop other programs and calibrate again"
        )
        return Calibration(prompts, latency, (), reason)
    decisions = []
    for temperature in temperatures:
        at = f"at temperature {temperature:g}"
        texts = acceptance.collect(
            pair,
            pair.texts(prompts.token_ids, new_tokens + acceptance.MAX_DEPTH, temperature),
            positions=effort.positions,
            seconds=effort.records_s,
            progress=functools.partial(progress, f"acceptance {at}"),
        )
        found = search.candidates(
            texts,
            latency.costs,
            width=pair.width,
            default=default,
            most_nodes=effort.nodes[-1],
            progress=functools.partial(progress, f"choosing {at}"),
        )
        compared = compare(
            pair,
            {name: one.policy for name, one in found.named().items()},
            prompts.token_ids[::-1],  # from the end: what the choice has not seen, where that is possible
            temperature=temperature,
            new_tokens=min(effort.compared_tokens, pair.context_length // 4),
            texts=effort.compared_texts,
            seconds=effort.compared_s,
            progress=functools.partial(progress, f"comparing {at}"),
        )
        decisions.append(decide(temperature, texts, found, compared))
    return Calibration(prompts, latency, tuple(decisions), None)


def decide(temperature: float, texts: list[TextRecords], found: Candidates, compared: dict[str, Compared]) -> Decision:
    """The kind that gains most over plain decoding. Matches alone must gain 2 %, the draft 2 % over those; a
    growing tree may be 3 % behind one that is always the same.
    """
    gains = {name: gain(one, found.plain, compared) for name, one in found.named().items() if name != "default"}
    best = found.adaptive if gains["adaptive"] >= ADAPTIVE_GAIN * gains["fixed"] else found.fixed
    modest = found.lookup if gains["lookup"] >= GAIN else found.plain
    chosen = best if gains[best.kind] >= GAIN * gains[modest.kind] else modest
    replay, plain = chosen.replay, found.plain.replay
    # Where the draft does not pay, the break-even is that of the trees it would have drafted.
    rounds = found.fixed.replay if chosen is modest else replay
    choice = Choice(
        temperature=temperature,
        kind=chosen.kind,
        tree=chosen.tree,
        chances=found.chances,
        accept_length=replay.accept_length,
        predicted=replay.tokens_per_second,
        measured=compared[chosen.kind].tokens_per_second,
        plain_predicted=plain.tokens_per_second,
        plain_measured=compared["plain"].tokens_per_second,
        break_even_accept_length=max(rounds.round_ms / plain.round_ms - 1, 0.0),
    )
    return Decision(temperature, texts, found, compared, chosen, choice)


def gain(one: Candidate, plain: Candidate, compared: dict[str, Compared]) -> float:
    """How many times faster than plain decoding: foretold and measured, each weighted by how certain it is. A few texts
    on a busy machine can be wrong by half; many on a quiet one overrule the model. No drafted round is cheaper than a
    plain one, so nothing gains more tokens than it accepts.
    """
    foretold = math.log(one.replay.tokens_per_second / plain.replay.tokens_per_second)
    ratio, error = compared[one.kind].over(compared[plain.kind])
    weight = 1 / max(error, _LEAST_ERROR) ** 2
    its_weight = 1 / _MODEL_ERROR**2
    combined = math.exp((weight * math.log(ratio) + its_weight * foretold) / (weight + its_weight))
    return min(combined, 1 + compared[one.kind].accept_length)


def as_profile(result: Calibration, artifact: str, machine: Machine, engines: Engines) -> HostProfile:
    """What `dovetail generate` reads, for the artifact of that digest."""
    return HostProfile(
        profile_version=PROFILE_VERSION,
        artifact=artifact,
        machine=machine,
        engines=engines,
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        text=result.text,
        error=result.latency.error,
        costs=result.latency.costs,
        choices=tuple(one.choice for one in sorted(result.decisions, key=lambda one: one.temperature)),
    )


def as_dict(result: Calibration, primary: float) -> dict[str, Any]:
    """The document of `--json`, but for machine and paths: what was found at temperature `primary`, and at each."""
    costs = result.latency.costs
    verify = {
        context: dict(zip(map(str, costs.nodes), row, strict=True))
        for context, row in zip(costs.contexts, costs.verify_ms, strict=True)
    }
    draft = {
        context: dict(zip(map(str, costs.widths), row, strict=True))
        for context, row in zip(costs.contexts, costs.level_ms, strict=True)
    }
    reference = min(costs.contexts, key=lambda context: abs(context - 256))
    document: dict[str, Any] = {
        "text": result.text,
        "t_verify_ms": verify[reference],
        "t_draft_ms": draft[reference],
        "reference_context": reference,
        "costs": dataclasses.asdict(costs),
        "error": result.latency.error,
        "spread": {
            str(nodes): timing.spread
            for (context, nodes), timing in result.latency.verify.items()
            if context == reference
        },
        "too_noisy": result.too_noisy,
        "by_temperature": [_decision_dict(decision) for decision in result.decisions],
    }
    if result.decisions:
        near = min(result.decisions, key=lambda decision: abs(decision.temperature - primary))
        document |= _decision_dict(near)
    return document


def _decision_dict(decision: Decision) -> dict[str, Any]:
    chosen, choice = decision.chosen, decision.choice
    replay, optimum = chosen.replay, decision.candidates.by_rank
    compared = decision.compared
    return {
        "temperature": decision.temperature,
        "chosen": {
            "policy": chosen.kind,
            **dataclasses.asdict(chosen.tree),
            "mean_nodes": replay.nodes / replay.rounds,
            "mean_depth": replay.levels / replay.rounds,
        },
        "acceptance": [list(row) for row in choice.chances.by_rank],
        "acceptance_by_score": list(choice.chances.by_score),
        "accept_histogram": [replay.accept_lengths[i] for i in range(max(replay.accept_lengths) + 1)],
        "accept_length": choice.accept_length,
        "texts": len(decision.texts),
        "positions": sum(map(len, decision.texts)),
        "predicted_tokens_per_second": choice.predicted,
        "plain_tokens_per_second": choice.plain_predicted,
        "break_even_accept_length": choice.break_even_accept_length,
        "optimum_by_rank": {
            **dataclasses.asdict(optimum.tree),
            "accept_length": optimum.accept_length,
            "tokens_per_second": 1e3 * optimum.tokens_per_ms,
        },
        "compared": {
            name: {
                "predicted_tokens_per_second": one.replay.tokens_per_second,
                "measured_tokens_per_second": compared[name].tokens_per_second,
                "measured_over_plain": compared[name].over(compared["plain"])[0],
                "accept_length": compared[name].accept_length,
                **dataclasses.asdict(one.tree),
            }
            for name, one in decision.candidates.named().items()
        },
    }
