"""`dovetail bench`: this artifact and what one would use instead, interleaved in one run on the same weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dovetail.calibration.commands.lossless import TEXTS, TOKENS, Output, check_flags, run_lossless
from dovetail.calibration.commands.places import need_place
from dovetail.runtime.artifact import strict_json
from dovetail.runtime.commands import options as runtime_options
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import in_flags, notice, print_json

if TYPE_CHECKING:
    from dovetail.calibration.bench.runner_process import Child
    from dovetail.calibration.bench.runners import Models, Runner
    from dovetail.calibration.bench.schedule import Task
    from dovetail.calibration.bench.workload import Prompt
    from dovetail.runtime.hardware.machine import Machine

FORMAT_VERSION = 1
_TOKENS, _QUICK_TOKENS = 96, 32
_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("artifact", type=_PATH)
@click.option("--checkpoint", type=_PATH, help="What was exported, a folder or a GGUF: for llama.cpp, transformers.")
@click.option("--assistant", type=_PATH, help="A small model, same tokenizer, folder or GGUF: the peers' draft.")
@click.option("--prompts", type=_PATH, help="Questions, as batch reads them: MT-bench, GSM8K, Alpaca, ...; all turns.")
@click.option(
    "--num-prompts", type=click.IntRange(1), help="So many of them, evenly by category.  [default: all; lossless: 16]"
)
@click.option("--runners", help="Names with commas between them.  [default: all]")
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(2), help="Most tokens of a text.  [default: 96; quick, lossless: 32]"
)
@click.option("--temperature", type=float, multiple=True, help="0 decodes greedily; repeatable.  [default: 0 and 1]")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Times the whole is done.")
@runtime_options.part_of_engine(
    draft_device="Where our draft runs.  [default: auto]",
    threads="CPU threads of every runner.  [default: as generate]",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quick", is_flag=True, help="Few prompts, short texts.")
@click.option("--lossless", is_flag=True, help="Time nothing: count the texts that are those of plain decoding.")
@click.option("--growth", is_flag=True, help="Also time contexts of 200 to 2,000 tokens.")
@click.option(
    "--timeout", type=click.FloatRange(1), default=900.0, show_default=True, help="Seconds a runner may think."
)
@click.option("--work", type=_PATH, help="Where converted models are kept.  [default: the user's cache folder]")
@click.option("--plots", type=_PATH, help="Write plots as PNG files into this folder.")
@click.option("--report", type=_PATH, help="Write the report as a Markdown file; lossless: between the marks of one.")
@click.option("--trust", is_flag=True, help="Skip the hashes of the artifact's files.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
def bench(
    artifact: Path,
    checkpoint: Path | None,
    assistant: Path | None,
    prompts: Path | None,
    num_prompts: int | None,
    runners: str | None,
    max_new_tokens: int | None,
    temperature: tuple[float, ...],
    repeats: int,
    seed: int,
    quick: bool,
    lossless: bool,
    growth: bool,
    timeout: float,
    work: Path | None,
    plots: Path | None,
    report: Path | None,
    trust: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Time ARTIFACT beside plain decoding, OpenVINO GenAI, llama.cpp and transformers, on the same prompts in turn.

    Every runner is a process of its own; one that lacks something, or dies, is named and left out.
    """
    from dovetail.calibration.bench.runners import REFERENCE, RUNNERS, Models, chosen_runners

    if lossless:
        check_flags(click.get_current_context())
    chosen = chosen_runners(runners)
    config = runtime_options.engine_config(engine)
    temperatures = _checked_temperatures(temperature)
    if plots is not None:
        _need_matplotlib()
    need_place("--plots", plots, is_folder=True)
    need_place("--report", report)
    opened = runtime_options.open_verified(os.fspath(artifact), trust)
    models = Models(opened, artifact, checkpoint, assistant, work or _cache_folder())
    if runners is None:
        chosen = [runner for runner in chosen if models.stands_beside(runner)]

    from dovetail.calibration.bench.bandwidth import measure_bandwidth
    from dovetail.calibration.bench.figures import figures
    from dovetail.calibration.bench.runner_process import loaded_child
    from dovetail.calibration.bench.schedule import make_tasks, measure
    from dovetail.calibration.commands.prompts import asked_prompts, growing_prompts
    from dovetail.runtime.hardware.machine import this_machine
    from dovetail.runtime.hardware.threads import default_threads

    threads = config.threads or default_threads()
    config = config.with_changes(threads=threads, ctx_size=opened.manifest.target.context_length)
    if lossless:
        tokens = _checked_tokens(max_new_tokens or TOKENS, models)
        asked = asked_prompts(
            opened, prompts, num_prompts or (TEXTS if prompts else None), is_quick=quick, tokens=tokens
        )
        questions = [prompt.ids for prompt in asked]
        output = Output(report, as_json)
        run_lossless(models, questions, config, output, tokens=tokens, seed=seed, timeout_s=timeout)
        return
    tokens = _checked_tokens(max_new_tokens or (_QUICK_TOKENS if quick else _TOKENS), models)
    groups, missing = _grouped(models, chosen)

    def load_options(runner: Runner) -> dict[str, Any]:
        return models.load_options(runner, config)

    def open_plain() -> Child:
        return loaded_child(RUNNERS[REFERENCE].command, load_options(RUNNERS[REFERENCE]), timeout)

    asked = asked_prompts(opened, prompts, num_prompts, is_quick=quick, tokens=tokens, open_plain=open_plain)
    growing = growing_prompts(opened, tokens) if growth else []
    tasks = make_tasks(asked, growing, max_new_tokens=tokens, temperatures=temperatures, repeats=repeats, seed=seed)
    here = this_machine()
    machine = _described(here, threads)
    bandwidth = measure_bandwidth(threads)
    notice(f"memory is read at {bandwidth.gb_per_s:.1f} GB/s by {threads} threads ({bandwidth.kernel})")

    with _progress(groups, tasks) as advance:
        measured = measure(groups, tasks, load_options, timeout_s=timeout, advance=advance)
    if not measured.samples:
        raise UserError("expected a runner that works, got none: " + "; ".join(measured.failed.values()))
    document = {
        "benchmark": "dovetail bench",
        "format_version": FORMAT_VERSION,
        "command": shlex.join(["dovetail", *sys.argv[1:]]),
        "machine": machine,
        "versions": here.versions,
        "seed": seed,
        "model": _about_model(models),
        "workload": {
            "max_new_tokens": tokens,
            "temperatures": temperatures,
            "repeats": repeats,
            "groups": measured.groups,
            "prompts": [_about_prompt(prompt) for prompt in asked],
        },
        "read_bandwidth_gb_per_s": bandwidth.gb_per_s,
        "read_bandwidth": dataclasses.asdict(bandwidth),
        **figures(chosen, measured, missing, read_bandwidth_gb_per_s=bandwidth.gb_per_s),
    }
    _tell(document, as_json, plots, report)


def _described(here: Machine, threads: int) -> dict[str, Any]:
    from dovetail.calibration.bench.machine import describe_machine

    machine = describe_machine(here, threads)
    if machine["load_average"] > machine["logical_cpus"] / 2:
        notice(f"warning: the machine is busy (load average {machine['load_average']}): figures will be off")
    return machine


def _tell(document: dict[str, Any], as_json: bool, plots: Path | None, report: Path | None) -> None:
    """Print the document, then write files of it: where they can't be written, all else is there."""
    from dovetail.calibration.bench.markdown import markdown
    from dovetail.calibration.bench.plots import write_plots
    from dovetail.calibration.bench.table import print_tables

    print_tables(document)
    if as_json:
        print_json(document)
    if plots is not None:
        for path in write_plots(document, plots):
            notice(f"wrote {path}")
    if report is not None:
        strict_json.write(report, markdown([document]))
        notice(f"wrote {report}")


def _checked_tokens(tokens: int, models: Models) -> int:
    context = models.artifact.manifest.target.context_length
    if tokens > context // 2:
        raise UserError(
            f"--max-new-tokens: expected at most {context // 2}, half of the context, got {tokens}; ask for less"
        )
    return tokens


def _grouped(models: Models, chosen: list[Runner]) -> tuple[list[list[Runner]], dict[str, str]]:
    """(runners that are loaded together, why others are left out)."""
    from dovetail.calibration.bench.schedule import memory_groups
    from dovetail.runtime.hardware.cpu import available_memory

    command = click.get_current_context().command
    missing = {runner.name: in_flags(why, command) for runner in chosen if (why := models.lacking(runner)) is not None}
    ready = [runner for runner in chosen if runner.name not in missing]
    if not ready:
        raise UserError(f"expected a runner that can run, got none: {'; '.join(missing.values())}")
    available = available_memory()
    groups, refused = memory_groups(ready, models.memory_bytes, available)
    missing |= refused
    for name, why in missing.items():
        notice(f"{name} is left out: {why}")
    if len(groups) > 1:
        notice(f"memory ({available / 1e9:.1f} GB free) holds the runners in {len(groups)} groups, one after the other")
    return groups, missing


def _checked_temperatures(values: tuple[float, ...]) -> list[float]:
    temperatures = list(dict.fromkeys(values)) or [0.0, 1.0]
    for value in temperatures:
        if not 0 <= value <= 100:
            raise UserError(f"--temperature: expected a number from 0 to 100, got {value:g}")
    return temperatures


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UserError("--plots: expected the package matplotlib, got none; pip install 'dovetail[bench]'")


def _cache_folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("dovetail") / "bench"


def _about_prompt(prompt: Prompt) -> dict[str, Any]:
    """`answer_tokens`: those of plain decoding's own answer, where that was asked for."""
    return {
        "category": prompt.category,
        "source": prompt.source,
        "tokens": len(prompt.ids),
        "answer_tokens": prompt.num_tokens,
    }


def _about_model(models: Models) -> dict[str, Any]:
    """What the figures are of; `like` where the checkpoint was inflated to a big model's shape."""
    manifest = models.artifact.manifest
    about: dict[str, Any] = {
        "name": manifest.name,
        "digest": models.artifact.digest,
        "architecture": manifest.target.architecture,
        "parameters": manifest.target.parameters,
        "weight_format": manifest.target.weight_format,
        "bytes": sum(entry.bytes for name, entry in manifest.files.items() if name.startswith("target/")),
        "draft": None if manifest.draft is None else manifest.draft.kind,
        "draft_parameters": None if manifest.draft is None else manifest.draft.parameters,
        "like": None,
    }
    if models.checkpoint is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            note = json.loads((models.checkpoint / "inflation.json").read_text(encoding="utf-8"))
            about["like"] = note.get("like") or note.get("shape")
            about["inflation"] = note
    return about


@contextlib.contextmanager
def _progress(groups: list[list[Runner]], tasks: list[Task]) -> Iterator[Callable[[], None]]:
    """What it yields is called after every text."""
    from dovetail.runtime.terminal.progress import stage

    number, total = itertools.count(1), sum(map(len, groups)) * len(tasks)
    with stage("texts") as bar:

        def advance() -> None:
            count = next(number)
            bar.update(count / total, f"{count} of {total}")

        yield advance
