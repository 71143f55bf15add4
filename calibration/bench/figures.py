"""From samples to figures: medians, ratios per task, accept lengths, times per round, share of the memory's limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dovetail.calibration.bench.runners import REFERENCE, Runner
from dovetail.calibration.bench.schedule import Measured, Sample, Task
from dovetail.calibration.bench.workload import ALL, GROWTH, MEAN
from dovetail.runtime.evaluation.repetition import repeated_share

_MEANS = (
    *("tokens_per_second", "ms_per_token", "ttft_ms", "speedup_over_fastest_plain", "accept_length_mean"),
    "repeated_8grams",
)


def ms_per_token(sample: Sample) -> float | None:
    """Time per token behind the first delivery; None where everything came at once."""
    first_ms, first_count = sample.rounds[0]
    rest = len(sample.token_ids) - first_count
    return (sample.rounds[-1][0] - first_ms) / rest if rest else None


def accept_lengths(sample: Sample) -> list[int]:
    """Accepted drafted tokens of every round behind the first delivery, the bonus token not counted."""
    return [count - 1 for _, count in sample.rounds[1:]]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def figures(
    runners: Sequence[Runner],
    measured: Measured,
    missing: Mapping[str, str],
    *,
    read_bandwidth_gb_per_s: float,
) -> dict[str, Any]:
    """The keys `runners`, `cells`, `growth`, `fastest_plain` and `speedup_over_fastest_plain` of the report's document.

    A runner's own figures are over all prompts at the first temperature; `cells` has them for every temperature and
    category, over all prompts, and as the mean over the categories, which counts each alike. `missing` says why runners
    were left out before anything was loaded.
    """
    tasks = measured.tasks
    temperatures = list(dict.fromkeys(task.temperature for task in tasks if task.prompt.category != GROWTH))
    categories = list(dict.fromkeys(task.prompt.category for task in tasks if task.prompt.category != GROWTH))
    main = temperatures[0] if temperatures else 0.0
    by_runner = {runner.name: [s for s in measured.samples if s.runner == runner.name] for runner in runners}

    def pick(name: str, wanted: Callable[[Task], bool]) -> list[Sample]:
        return [s for s in by_runner[name] if wanted(tasks[s.task])]

    def at(temperature: float, category: str = ALL) -> Callable[[Task], bool]:
        return lambda task: (
            task.temperature == temperature
            and task.prompt.category != GROWTH
            and category in (ALL, task.prompt.category)
        )

    fastest = {t: _fastest_plain(runners, lambda name, t=t: pick(name, at(t))) for t in temperatures}  # type: ignore[misc]
    cells = []
    for temperature in temperatures:
        for category in [ALL, *categories] if len(categories) > 1 else [ALL]:
            wanted = at(temperature, category)
            against = [] if fastest[temperature] is None else pick(str(fastest[temperature]), wanted)
            for runner in runners:
                if samples := pick(runner.name, wanted):
                    cells.append(
                        {
                            "temperature": temperature,
                            "category": category,
                            "runner": runner.name,
                            **_speed(samples),
                            "speedup_over_fastest_plain": _ratio(against, samples),
                            **_acceptance(runner, samples),
                            "repeated_8grams": repeated_share([sample.token_ids for sample in samples]),
                        }
                    )
    cells += _means(cells)
    own = {cell["runner"]: cell for cell in cells if cell["temperature"] == main and cell["category"] == ALL}
    rows = []
    for runner in runners:
        samples = pick(runner.name, at(main))
        loaded, cell = measured.loaded.get(runner.name, {}), own.get(runner.name, {})
        reason = missing.get(runner.name) or measured.failed.get(runner.name)
        parts = _parts(samples)
        speed = _gb_per_s(runner, samples, parts, loaded.get("bytes_per_pass"))
        rows.append(
            {
                "name": runner.name,
                "available": bool(samples),
                "reason": None if samples else reason or "it made no text",
                "temperature": main,
                **{key: cell.get(key) for key in ("tokens_per_second", "ms_per_token", "ttft_ms")},
                "speedup_over_fastest_plain": cell.get("speedup_over_fastest_plain"),
                "peak_rss_mb": measured.peak_rss_mb.get(runner.name),
                "load_s": loaded.get("load_s"),
                "import_s": loaded.get("import_s"),
                "accept_length_mean": cell.get("accept_length_mean"),
                "accept_histogram": cell.get("accept_histogram"),
                **parts,
                "gb_per_s": speed,
                "bandwidth_share": None if speed is None else speed / read_bandwidth_gb_per_s,
                **_agreement(runner.name, by_runner, measured),
                "weights": loaded.get("weights"),
                "settings": loaded.get("settings"),
                "versions": loaded.get("versions"),
            }
        )
    dovetail = own.get("dovetail", {})
    return {
        "runners": rows,
        "cells": cells,
        "growth": _growth(runners, by_runner, tasks),
        "fastest_plain": fastest.get(main),
        "speedup_over_fastest_plain": dovetail.get("speedup_over_fastest_plain"),
    }


def _means(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A cell per temperature and runner: the means over the categories, where every category has the figure."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["category"] != ALL:
            groups.setdefault((cell["temperature"], cell["runner"]), []).append(cell)
    means = []
    for (temperature, runner), own in groups.items():
        mean: dict[str, Any] = {"temperature": temperature, "category": MEAN, "runner": runner}
        for name in _MEANS:
            values = [cell[name] for cell in own]
            mean[name] = None if None in values else statistics.fmean(values)
        means.append(mean)
    return means


def _fastest_plain(runners: Sequence[Runner], samples_of: Callable[[str], list[Sample]]) -> str | None:
    speeds = {}
    for runner in runners:
        if runner.is_plain and (ms := _median(map(ms_per_token, samples_of(runner.name)))) is not None:
            speeds[runner.name] = ms
    return min(speeds, key=lambda name: speeds[name]) if speeds else None


def _speed(samples: Sequence[Sample]) -> dict[str, float | None]:
    ms = _median(map(ms_per_token, samples))
    return {
        "tokens_per_second": 1e3 / ms if ms else None,
        "ms_per_token": ms,
        "ttft_ms": _median(sample.rounds[0][0] for sample in samples),
    }


def _ratio(plain: Sequence[Sample], samples: Sequence[Sample]) -> float | None:
    """Median over the tasks of how many times faster than the plain runner on the same task."""
    theirs = {sample.task: ms_per_token(sample) for sample in plain}
    pairs = [(theirs.get(sample.task), ms_per_token(sample)) for sample in samples]
    return _median(a / b if a and b else None for a, b in pairs)


def _acceptance(runner: Runner, samples: Sequence[Sample]) -> dict[str, Any]:
    lengths = [length for sample in samples for length in accept_lengths(sample)]
    if runner.is_plain or not lengths:
        return {"accept_length_mean": None, "accept_histogram": None}
    histogram = [lengths.count(length) for length in range(max(lengths) + 1)]
    return {"accept_length_mean": statistics.fmean(lengths), "accept_histogram": histogram}


def _parts(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Milliseconds of a mean round: in the draft, in the target, and in neither; None where an engine tells nothing."""
    told = [s for s in samples if None not in (s.draft_ms, s.verify_ms, s.timed_ms) and s.num_timed_rounds]
    if not told or len(told) < len(samples):
        return {"draft_ms": None, "verify_ms": None, "host_ms": None}
    rounds = sum(s.num_timed_rounds or 0 for s in told)
    draft, verify, timed = (
        sum(getattr(s, part) for s in told) / rounds for part in ("draft_ms", "verify_ms", "timed_ms")
    )
    return {"draft_ms": draft, "verify_ms": verify, "host_ms": max(0.0, timed - draft - verify)}


def _gb_per_s(
    runner: Runner, samples: Sequence[Sample], parts: Mapping[str, float | None], bytes_per_pass: int | None
) -> float | None:
    """Bytes of weights a pass reads over the time of a pass: the target's own time, or else the whole round where no
    second model works in it.
    """
    pass_ms = parts["verify_ms"]
    if pass_ms is None and runner.draft in ("none", "lookup"):
        rounds = sum(len(sample.rounds) - 1 for sample in samples)
        pass_ms = sum(s.rounds[-1][0] - s.rounds[0][0] for s in samples) / rounds if rounds else None
    return bytes_per_pass / pass_ms / 1e6 if bytes_per_pass and pass_ms else None


def _agreement(name: str, by_runner: Mapping[str, list[Sample]], measured: Measured) -> dict[str, Any]:
    """Whether the greedy texts are the reference's; else the first divergence, with the reference's margin there."""
    departed: list[dict[str, Any]] = []
    tasks, texts = measured.tasks, 0
    reference = {sample.task: sample.token_ids for sample in by_runner.get(REFERENCE, [])}
    for sample in by_runner[name]:
        task = tasks[sample.task]
        theirs = reference.get(sample.task)
        if theirs is None or task.temperature or task.repeat or task.prompt.category == GROWTH:
            continue
        texts += 1
        if sample.token_ids != theirs:
            position = next(i for i, (a, b) in enumerate(zip(sample.token_ids, theirs, strict=True)) if a != b)
            margins = measured.margins.get(sample.task)
            departed.append(
                {
                    "prompt": task.prompt.source,
                    "position": position,
                    "margin": None if margins is None else margins[position],
                }
            )
    first = min(departed, key=lambda entry: int(entry["position"]), default=None)
    known = [entry["margin"] for entry in departed if entry["margin"] is not None]
    return {
        "tokens_match": None if not texts else not departed,
        "texts_compared": texts,
        "texts_departed": len(departed),
        "first_divergence": first,
        "largest_margin": max(known, default=None),
    }


def _growth(
    runners: Sequence[Runner], by_runner: Mapping[str, list[Sample]], tasks: Sequence[Task]
) -> list[dict[str, Any]]:
    rows = []
    for runner in runners:
        contexts: dict[int, list[Sample]] = {}
        for sample in by_runner[runner.name]:
            prompt = tasks[sample.task].prompt
            if prompt.category == GROWTH:
                contexts.setdefault(len(prompt.ids), []).append(sample)
        for context, samples in sorted(contexts.items()):
            rows.append({"runner": runner.name, "context": context, **_speed(samples), **_acceptance(runner, samples)})
    return rows
