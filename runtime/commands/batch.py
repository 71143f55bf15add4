"""The command `dovetail batch`."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import sys
from typing import TYPE_CHECKING, Any

import click

from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.batch.input_file import InputFile, open_input
from dovetail.runtime.batch.output_file import OutputFile, Tally
from dovetail.runtime.commands import flags, options
from dovetail.runtime.commands.interrupts import Interrupts
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.errors import ContextOverflowError, UserError
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.settings import settings_of
from dovetail.runtime.terminal.console import notice, print_json
from dovetail.runtime.terminal.count_bar import count_bar

if TYPE_CHECKING:
    from dovetail.runtime.batch.run import Figures
    from dovetail.runtime.pipeline import Pipeline

_MOST_NAMED = 20
_SEQUENCES = dataclasses.replace(
    settings_of(EngineConfig)["sequences"],
    has_flag=True,
    help="Lines worked on at a time, each with room for --ctx-size tokens.",
    shown_default="16, or what memory allows",
)


@click.command()
@click.argument("artifact", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="Where the answers go.")
@flags.options([_SEQUENCES])[0]
@options.controls
@options.engine
@options.chat_template_kwargs
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document, a summary.")
def batch(
    artifact: str,
    file: str,
    output: str,
    chat_template_kwargs: dict[str, Any] | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Answer every line of FILE with the model in ARTIFACT, several lines at a time.

    FILE (- is stdin) has a JSON object a line, with messages, turns, question, instruction and input, or prompt; or it
    is an OpenAI batch file, and what its bodies say wins over the flags. Where the model has a chat template, turns
    (only the first of them is asked), question and instruction become a user's message; a prompt is always continued
    as it is. A line's id is its custom_id, id, question_id or task_id, or else its number.

    The output has a line for every line, in order; one that can't be done has an error in it, and the exit code is 2.
    When the command was stopped or killed, the same command goes on where it was: OUTPUT.progress.json lies beside the
    output until all is done. Line N is sampled with the seed S + N - 1, where S is --seed.
    """
    controls, engine = options.split(given)
    GenerationConfig().with_changes(**controls)
    out = OutputFile(output)
    with Interrupts() as interrupts:
        try:
            with out, open_input(file) as source:
                figures = _run(artifact, source, out, controls, engine, chat_template_kwargs, interrupts)
        except KeyboardInterrupt:
            figures = None
    done, failed = out.tally.done, out.tally.failed
    if figures is None:
        notice(f"stopped: {_lines(done)} written to {output}" + (f"; {_again(file)}" if done else ""))
        sys.exit(130)
    if as_json:
        about = {"lines": done, "failed": len(failed), "failed_lines": failed, "seed": out.seed}
        print_json({**about, **dataclasses.asdict(figures), "tokens_per_second": figures.tokens_per_second})
    notice(
        f"{_lines(done)}, {figures.tokens} tokens in {figures.seconds:.2f} s, "
        f"{figures.tokens_per_second:.1f} tokens/s, seed {out.seed}"
    )
    if failed:
        raise UserError(_failures(out.tally))


def _run(
    path: str,
    source: InputFile,
    out: OutputFile,
    controls: dict[str, Any],
    engine: dict[str, Any],
    variables: dict[str, Any] | None,
    interrupts: Interrupts,
) -> Figures | None:
    """What it took to bring the batch to its end; None if that was interrupted."""
    digest = open_artifact(path, trust=True).digest  # a mere look: hashes are checked before anything is loaded
    lines = source.lines()
    origin = _origin(source, digest, controls, engine) | ({"chat_template_kwargs": variables} if variables else {})
    out.begin(origin, lines, controls.pop("seed", None), secrets.randbits(32))
    if out.tally.done:
        notice(f"going on: {out.tally.done} of {_lines(source.count)} are there")
    with _open(path, controls, engine) as pipe, count_bar("lines", source.count, out.tally.done) as show:
        from dovetail.runtime.batch.run import BatchRun

        run = BatchRun(pipe, pipe.config(**controls), lines, out, variables)
        interrupts.is_patient = True
        try:
            while not run.is_done:
                if interrupts.is_asked:
                    return None
                run.advance()
                show(out.tally.done, f"{run.pace:.1f} tokens/s")
        finally:
            run.close()
    out.finish()
    return run.figures


def _origin(source: InputFile, digest: str, controls: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """All that decides what the answers are, but for the seed."""
    config = GenerationConfig().with_changes(**controls)
    values = {name: getattr(config, name) for name in controls if name != "seed"}
    template = engine.get("chat_template")
    return {
        "input_sha256": source.sha256,
        "artifact": digest,
        "controls": {
            name: repr(sorted(value) if isinstance(value, frozenset) else value) for name, value in values.items()
        },
        "numerics": engine.get("numerics", "fast"),
        "ctx_size": engine.get("ctx_size"),
        "chat_template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }


def _open(path: str, controls: dict[str, Any], engine: dict[str, Any]) -> Pipeline:
    try:
        return options.open_pipeline(path, controls, engine)
    except ContextOverflowError as error:
        if "sequences" not in engine:
            raise
        raise ContextOverflowError(f"--sequences {engine['sequences']}: {error}") from None


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"


def _again(file: str) -> str:
    return "the same command goes on behind them" + (", given the same lines" if file == "-" else "")


def _failures(tally: Tally) -> str:
    numbers = ", ".join(map(str, tally.failed[:_MOST_NAMED]))
    if len(tally.failed) == 1:
        return f"1 of {_lines(tally.done)} was not done: {tally.first_error}"
    more = f" and {len(tally.failed) - _MOST_NAMED} more" if len(tally.failed) > _MOST_NAMED else ""
    return f"{len(tally.failed)} of {tally.done} lines were not done: lines {numbers}{more}; {tally.first_error}"
