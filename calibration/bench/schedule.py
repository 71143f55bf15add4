"""Runs every task on every runner, interleaved: a slow moment of the machine hits all alike."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from dovetail.calibration.bench.runner_process import Child, RunnerError
from dovetail.calibration.bench.runners import REFERENCE, Runner
from dovetail.calibration.bench.workload import GROWTH, Prompt
from dovetail.runtime.errors import UserError

_log = logging.getLogger(__name__)

_SETTLE_S = 0.05  # between two runs: threads of the last engine that still spin, waiting for work, go to sleep
_WARM_UP_TOKENS = 16
GROWTH_TOKENS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One text that every runner makes."""

    prompt: Prompt
    max_new_tokens: int
    temperature: float
    seed: int
    repeat: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One runner's text for the task numbered `task`. The rest is as in `peers.protocol.Answer`."""

    runner: str
    task: int
    token_ids: list[int]
    rounds: list[tuple[float, int]]
    draft_ms: float | None
    verify_ms: float | None
    timed_ms: float | None
    num_timed_rounds: int | None


@dataclasses.dataclass(slots=True)
class Measured:
    """All that was measured. `margins` holds, per task, how far the reference's best logit was above the next, for each
    token of its text; only for tasks whose text some runner made differently.
    """

    tasks: list[Task]
    groups: list[list[str]]
    loaded: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    peak_rss_mb: dict[str, float] = dataclasses.field(default_factory=dict)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    margins: dict[int, list[float]] = dataclasses.field(default_factory=dict)


def make_tasks(
    prompts: Sequence[Prompt],
    growth: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperatures: Sequence[float],
    repeats: int,
    seed: int,
) -> list[Task]:
    """Every prompt at every temperature, all of it `repeats` times; growth is greedy. A text is as long as its prompt
    says, or else `max_new_tokens`. Prompt i is sampled with `seed` + i.
    """
    tasks = []
    for repeat in range(repeats):
        for i, prompt in enumerate(prompts):
            tokens = prompt.num_tokens or max_new_tokens
            tasks += [Task(prompt, tokens, temperature, seed + i, repeat) for temperature in temperatures]
        tasks += [Task(prompt, min(GROWTH_TOKENS, max_new_tokens), 0.0, seed, repeat) for prompt in growth]
    return tasks


def memory_groups(
    runners: Sequence[Runner], needs: Callable[[Runner], int], available: int
) -> tuple[list[list[Runner]], dict[str, str]]:
    """(runners that are loaded together, why some can't be loaded at all). The reference is in every group.

    Raises `UserError` where there is no memory for anybody.
    """
    if sum(map(needs, runners)) <= available:
        return [list(runners)], {}
    reference = [runner for runner in runners if runner.name == REFERENCE]
    shared = sum(map(needs, reference))
    groups: list[list[Runner]] = []
    rooms: list[int] = []
    refused = {}
    for runner in runners:
        need = needs(runner)
        if runner in reference and need <= available:
            continue
        if (0 if runner in reference else shared) + need > available:
            beside = f" beside {REFERENCE}" if reference and runner not in reference else ""
            refused[runner.name] = (
                f"expected about {need / 1e9:.1f} GB of memory{beside}, got {available / 1e9:.1f} GB free; close "
                "something or choose a smaller model"
            )
            continue
        place = next((i for i, room in enumerate(rooms) if need <= room), None)
        if place is None:
            groups.append([*reference])
            rooms.append(available - shared)
            place = -1
        groups[place].append(runner)
        rooms[place] -= need
    if not groups and reference and REFERENCE not in refused:
        groups.append(reference)
    if not groups:
        name, why = next(iter(refused.items()))
        raise UserError(f"{name}: {why}")
    return groups, refused


def measure(
    groups: Sequence[Sequence[Runner]],
    tasks: Sequence[Task],
    load_options: Callable[[Runner], dict[str, Any]],
    *,
    timeout_s: float,
    advance: Callable[[], None] = lambda: None,
) -> Measured:
    """Load the runners of each group, warm each up, run all tasks, the order of the runners turned by one each time.

    A runner that dies, hangs or refuses is logged, kept in `failed`, and the others go on. `advance` is
    called after every run.
    """
    measured = Measured(list(tasks), [[runner.name for runner in group] for group in groups])
    for group in groups:
        with contextlib.ExitStack() as stack:
            _measure_group(group, measured, load_options, timeout_s, advance, stack)
    measured.samples = [sample for sample in measured.samples if sample.runner not in measured.failed]
    return measured


def _measure_group(
    group: Sequence[Runner],
    measured: Measured,
    load_options: Callable[[Runner], dict[str, Any]],
    timeout_s: float,
    advance: Callable[[], None],
    stack: contextlib.ExitStack,
) -> None:
    children: dict[str, Child] = {}

    def give_up(name: str, error: RunnerError) -> None:
        measured.failed[name] = str(error)
        _log.warning(f"{name}: {error}")
        if name in children:
            children.pop(name).close()

    for runner in group:
        if runner.name in measured.failed:
            continue
        _log.info(f"loading {runner.name}")
        try:
            options = load_options(runner)
            children[runner.name] = child = Child(runner.command, timeout_s)
            stack.callback(child.close)
            loaded = child.ask("load", **options)
            child.ask("run", **_request(measured.tasks[0], _WARM_UP_TOKENS))
        except RunnerError as error:
            give_up(runner.name, error)
            continue
        measured.loaded.setdefault(runner.name, loaded)

    done_before = {(sample.runner, sample.task) for sample in measured.samples}
    for number, task in enumerate(measured.tasks):
        names = list(children)
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            time.sleep(_SETTLE_S)
            try:
                answer = children[name].ask("run", **_request(task))
                sample = _sample(name, number, answer, task.max_new_tokens)
            except RunnerError as error:
                give_up(name, error)
                continue
            if (name, number) not in done_before:  # else it is the reference, in a later group only for its margins
                measured.samples.append(sample)
            advance()
    if REFERENCE in children:
        try:
            _ask_margins(children[REFERENCE], measured)
        except RunnerError as error:
            _log.warning(f"margins are missing: {error}")
    for name, child in children.items():
        try:
            measured.peak_rss_mb.setdefault(name, float(child.ask("stats")["peak_rss_mb"]))
        except (RunnerError, KeyError, TypeError) as error:
            _log.warning(f"{name}: peak memory is missing: {error}")


def _request(task: Task, max_new_tokens: int | None = None) -> dict[str, Any]:
    return {
        "ids": task.prompt.ids,
        "max_new_tokens": min(task.max_new_tokens, max_new_tokens or task.max_new_tokens),
        "temperature": task.temperature,
        "seed": task.seed,
    }


def _sample(runner: str, task: int, answer: dict[str, Any], wanted: int) -> Sample:
    """A checked answer. Raises `RunnerError` where it is not what was asked for."""
    try:
        rounds = [(float(ms), int(count)) for ms, count in answer["rounds"]]
        ids = [int(token) for token in answer["token_ids"]]
        parts = {name: answer.get(name) for name in ("draft_ms", "verify_ms", "timed_ms", "num_timed_rounds")}
    except (KeyError, TypeError, ValueError) as error:
        raise RunnerError(f"answered without its rounds and tokens: {error!r:.100}") from None
    if len(ids) != wanted or sum(count for _, count in rounds) != wanted:
        raise RunnerError(f"expected {wanted} tokens, got {len(ids)}")
    return Sample(runner, task, ids, rounds, **parts)


def _ask_margins(reference: Child, measured: Measured) -> None:
    """Have the reference make once more, untimed, the greedy texts that somebody made differently."""
    texts: dict[int, set[tuple[int, ...]]] = {}
    own = {}
    for sample in measured.samples:
        task = measured.tasks[sample.task]
        if task.temperature == 0 and task.prompt.category != GROWTH and task.repeat == 0:
            texts.setdefault(sample.task, set()).add(tuple(sample.token_ids))
            if sample.runner == REFERENCE:
                own[sample.task] = sample.token_ids
    for number in sorted(own):
        if len(texts[number]) > 1 and number not in measured.margins:
            again = reference.ask("run", **_request(measured.tasks[number]), margins=True)
            if again["token_ids"] == own[number]:
                measured.margins[number] = [float(margin) for margin in again["margins"]]
