"""`dovetail calibrate`: measure this host and a pair, choose how far trees grow, and keep that in a profile."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dovetail.calibration.commands.calibration_prompts import FindPrompts, by_flags, library_text, read_text
from dovetail.calibration.commands.places import need_place
from dovetail.runtime.commands import options
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import notice, on_terminal, print_json, stderr_console, waiting

if TYPE_CHECKING:
    from dovetail.calibration.choose.calibration import Calibration, Decision
    from dovetail.runtime.artifact.opening import Artifact
    from dovetail.runtime.decoding.engine_config import EngineConfig
    from dovetail.runtime.pipeline import Pipeline
    from dovetail.runtime.policies.host_profile import Engines, HostProfile

_SEQUENCES = 16  # contexts that the cache holds: all that is timed stays open, up to eight texts of each
_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("artifact", type=click.Path())
@click.option("--quick", is_flag=True, help="A quarter of the time, for a first look.")
@click.option(
    "--prompts",
    type=_PATH,
    help="Questions like those you ask, JSON lines as for dovetail bench.  [default: the model's own, if it has a chat "
    "template; else --text]",
)
@click.option("--text", type=_PATH, help="A text like those you generate.  [default: this Python's library, held out]")
@click.option("--temperature", type=float, help="Decide for this one alone.  [default: for 0 and for 1]")
@click.option("--profile", type=_PATH, help="Write the profile here.  [default: into the user's cache folder]")
@click.option("--report", type=_PATH, help="Also write a page with plots (HTML, needs the extra bench).")
@click.option("--quality", is_flag=True, help="Compare the quantised target with --reference, and decide nothing.")
@click.option("--reference", type=_PATH, help="An artifact or IR of the same target with float weights.")
@options.part_of_engine(
    threads="CPU threads of both engines.  [default: what is fastest]",
    draft_device="As for dovetail generate.  [default: auto]",
    numerics="Calibrate for generating with --exact.",
    acceptance="Calibrate for generating with the same flag.  [default: confirmed]",
)
@click.option("--trust", is_flag=True, help="Skip the hashes of the artifact's files.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
def calibrate(
    artifact: str,
    quick: bool,
    prompts: Path | None,
    text: Path | None,
    temperature: float | None,
    profile: Path | None,
    report: Path | None,
    quality: bool,
    reference: Path | None,
    trust: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Measure this machine with ARTIFACT and choose the tree; dovetail generate then uses what was found."""
    if report is not None:
        from dovetail.calibration.commands.calibration_page import require_plots

        require_plots()
    need_place("--profile", profile)
    need_place("--report", report)
    if temperature is not None and not 0 <= temperature <= 100:
        raise UserError(f"--temperature: expected a number from 0 to 100, got {temperature:g}")
    if quality != (reference is not None):
        raise UserError("expected --quality and --reference together, got one of them; give both or none")
    if prompts is not None and (quality or text is not None):
        raise UserError(f"expected one of --prompts and {'--quality' if quality else '--text'}, got both; drop one")
    config = options.engine_config(engine)
    find_prompts = by_flags(prompts, text)
    opened = options.open_verified(artifact, trust)
    if quality:
        assert reference is not None
        _quality(opened, reference, text, config.threads, as_json)
        return
    if opened.manifest.draft is None:
        raise UserError(f"{artifact}: expected an artifact with a draft, got one without; nothing is to be decided")
    _calibrate(opened, config, quick, find_prompts, temperature, profile, report, as_json)


def _calibrate(
    opened: Artifact,
    config: EngineConfig,
    quick: bool,
    find_prompts: FindPrompts,
    temperature: float | None,
    path: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    from dovetail.calibration.choose import calibration as decision
    from dovetail.calibration.measure.pair import PipelinePair
    from dovetail.runtime.hardware.machine import this_machine
    from dovetail.runtime.policies.base import unmeasured_tree
    from dovetail.runtime.policies.host_profile import cache_path

    machine = this_machine()
    busy = os.getloadavg()[0]
    if busy > 0.5 * machine.cores:
        notice(
            f"warning: other programs keep {busy:.1f} of {machine.cores} cores busy, and will slow down what is timed"
        )
    counts = _threads(opened, config, quick)
    with _pipeline(opened, config, *counts) as pipe:
        pair = PipelinePair(pipe)
        effort = decision.QUICK if quick else decision.Effort()
        with _bars() as progress:
            result = decision.calibrate(
                pair,
                find_prompts(pipe, effort, progress),
                effort=effort,
                default=unmeasured_tree(opened.manifest.default_tree, pair.branches_cost),
                temperatures=decision.TEMPERATURES if temperature is None else (temperature,),
                progress=progress,
            )
        engines = _engines(pipe, counts)
        primary = pipe.tokenizer.generation.temperature if temperature is None else temperature
    document: dict[str, Any] = {
        "artifact": opened.digest,
        "machine": dataclasses.asdict(machine),
        "engines": dataclasses.asdict(engines),
        "seconds": result.latency.seconds,
        **decision.as_dict(result, primary),
        "profile": None,
    }
    if result.too_noisy is None:
        profile = decision.as_profile(result, opened.digest, machine, engines)
        place = path or cache_path(opened.digest, machine, engines.draft_device, engines.numerics, engines.acceptance)
        document["profile"] = _keep(profile, place, asked=path is not None)
    else:
        notice(f"warning: {result.too_noisy}; the artifact's default tree stays")
    if as_json:
        print_json(document)
    else:
        _show(result, document)
    if report is not None:  # last: where it can't be written, all else is there
        from dovetail.calibration.commands.calibration_page import write_report

        write_report(report, opened.manifest.name, document, result)
        notice(f"report: {report}")


def _engines(pipe: Pipeline, counts: tuple[int, int]) -> Engines:
    from dovetail.runtime.policies.host_profile import Engines

    return Engines(pipe.draft_device, pipe.target.numerics, pipe.target.acceptance, *counts)


def _pipeline(opened: Artifact, config: EngineConfig, threads: int, draft_threads: int) -> Pipeline:
    from dovetail.calibration.measure.latency import CONTEXTS, ROOM
    from dovetail.runtime.pipeline import Pipeline

    config = config.with_changes(
        threads=threads,
        draft_threads=draft_threads,
        ctx_size=min(opened.manifest.target.context_length, CONTEXTS[-1] + ROOM + 64),
        sequences=_SEQUENCES,
        profile=None,
    )
    with waiting("loading the models"):
        return Pipeline(opened, config)


def _threads(opened: Artifact, config: EngineConfig, quick: bool) -> tuple[int, int]:
    """(target's, draft's): as given, else the fastest of all cores and half of them."""
    from dovetail.calibration.measure.latency import fastest_threads
    from dovetail.calibration.measure.pair import PipelinePair
    from dovetail.runtime.hardware.threads import default_threads

    cores = default_threads()
    if config.threads is not None or quick or cores == 1:
        return config.threads or cores, config.threads or cores

    @contextlib.contextmanager
    def opening(count: int) -> Iterator[PipelinePair]:
        with _pipeline(opened, config, count, count) as pipe:
            yield PipelinePair(pipe)

    with waiting("trying numbers of threads"):
        chosen, by_count = fastest_threads(opening, [cores, cores // 2])
    for count, (target_ms, draft_ms) in by_count.items():
        notice(f"threads {count}: {target_ms:.2f} ms a pass of 8 nodes, {draft_ms:.2f} ms a call of the draft")
    return chosen


def _keep(profile: HostProfile, path: Path, asked: bool) -> str | None:
    """Write the profile; where it can't be written, say so once, and fail only if the user named the place."""
    from dovetail.runtime.policies.host_profile import write

    try:
        write(profile, path)
    except OSError as error:
        if asked:
            raise UserError(f"--profile {path}: expected a writable path, got {error.strerror}; give another") from None
        notice(f"warning: the profile is not kept, {path.parent}: {error.strerror}; give --profile FILE instead")
        return None
    notice(f"profile: {path}")
    return str(path)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, float], None]]:
    """A bar per step on a terminal; off it, a line when one begins."""
    if not on_terminal():
        seen: set[str] = set()

        def tell(what: str, share: float) -> None:
            if what not in seen:
                seen.add(what)
                notice(what)

        yield tell
        return
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    tasks: dict[str, TaskID] = {}
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=stderr_console()) as progress:

        def show(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=share)

        yield show


def _show(result: Calibration, document: dict[str, Any]) -> None:
    costs = result.latency.costs
    context = document["reference_context"]
    click.echo(f"{'text':<18} {result.text}")
    row = costs.contexts.index(context)
    click.echo(f"{'a round, plain':<18} {costs.plain_ms[row]:.2f} ms at {context} tokens of context")
    passes = "  ".join(f"{n}: {ms:.2f}" for n, ms in zip(costs.nodes, costs.verify_ms[row], strict=True))
    click.echo(f"{'ms by nodes':<18} {passes}")
    calls = "  ".join(f"{w}: {ms:.2f}" for w, ms in zip(costs.widths, costs.level_ms[row], strict=True))
    click.echo(f"{'draft ms by width':<18} first {costs.first_ms[row]:.2f}, then {calls}")
    click.echo(f"{'uncertainty':<18} {result.latency.error:.1%} of a typical time, {result.latency.rounds} rounds")
    for decision in result.decisions:
        _show_decision(decision)


def _show_decision(decision: Decision) -> None:
    choice, tree, replay = decision.choice, decision.choice.tree, decision.chosen.replay
    label = f"temperature {decision.temperature:g}"
    needed = f"break-even accept length {choice.break_even_accept_length:.2f}"
    if not choice.drafts:
        reached = decision.candidates.fixed.replay.accept_length
        instead = "plain decoding" if choice.kind == "plain" else "matches in the text alone"
        click.echo(f"{label:<18} {instead}: the draft does not pay here ({needed}, reached {reached:.2f})")
    elif choice.kind == "fixed":
        click.echo(f"{label:<18} fixed tree: {tree.nodes} nodes, depth {tree.depth}, width {tree.width} ({needed})")
    else:
        click.echo(
            f"{label:<18} adaptive tree: width {tree.width}, {replay.nodes / replay.rounds:.1f} nodes and "
            f"{replay.levels / replay.rounds:.1f} levels on average ({needed})"
        )
    gain = decision.compared[choice.kind].over(decision.compared["plain"])[0]
    click.echo(f"{'':<18} {decision.texts_summary}")
    click.echo(
        f"{'':<18} {choice.predicted:.1f} tokens/s foretold, {choice.measured:.1f} measured; over plain decoding "
        f"{choice.predicted / choice.plain_predicted:.2f} foretold, {gain:.2f} measured; accept length "
        f"{choice.accept_length:.2f}"
    )


def _quality(opened: Artifact, reference: Path, text: Path | None, threads: int | None, as_json: bool) -> None:
    from dovetail.calibration.measure.quality import compare_targets
    from dovetail.runtime.hardware.threads import default_threads
    from dovetail.runtime.text.tokenizer import load_tokenizer

    tokens = load_tokenizer(opened).encode(library_text() if text is None else read_text(text))
    with _bars() as progress:
        quality = compare_targets(
            opened,
            reference,
            tokens,
            threads=threads or default_threads(),
            progress=lambda share: progress("reading the text with both targets", share),
        )
    if as_json:
        print_json(dataclasses.asdict(quality))
        return
    click.echo(f"{'text':<18} {quality.tokens} tokens in windows of {quality.window}")
    click.echo(f"{'perplexity':<18} {quality.perplexity:.4f}, reference {quality.reference_perplexity:.4f}")
    click.echo(f"{'KL, nats a token':<18} mean {quality.kl_mean:.6f}, 99th percentile {quality.kl_p99:.6f}")
    click.echo(f"{'argmax agreement':<18} {quality.argmax_agreement:.2%}")
    click.echo(
        f"{'as run by default':<18} KL mean {quality.fast_kl_mean:.6f}, 99th percentile {quality.fast_kl_p99:.6f}, "
        f"argmax {quality.fast_argmax_agreement:.2%}, perplexity {quality.fast_perplexity:.4f}: activations in 8 bits"
    )
