"""`dovetail bench --lossless`: how many texts of every way to decode are those of plain decoding, as a table."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import notice, print_json
from dovetail.runtime.terminal.progress import stage

if TYPE_CHECKING:
    from dovetail.calibration.bench.lossless import Cell, Engine, Writer
    from dovetail.calibration.bench.runners import Models
    from dovetail.runtime.decoding.engine_config import EngineConfig

FORMAT_VERSION = 1
TEXTS, TOKENS = 16, 32
_CONTEXT = 1024
_OF_TIMES = ("checkpoint", "runners", "temperature", "repeats", "growth", "plots")
_MARKS = "<!-- lossless -->\n", "<!-- /lossless -->"
_GENAI_NAMES = {"fast": "OpenVINO GenAI, its defaults", "exact": "OpenVINO GenAI, float32"}


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """Where the table goes besides: a Markdown file, between its marks if it has them; one JSON document."""

    report: Path | None
    as_json: bool


def check_flags(context: click.Context) -> None:
    """Raise `UserError` for a flag that only means something where speed is measured."""
    for name in _OF_TIMES:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UserError(f"--{name}: expected it without --lossless, which times nothing; drop one of them")


def run_lossless(
    models: Models,
    questions: Sequence[Sequence[int]],
    config: EngineConfig,
    output: Output,
    *,
    tokens: int,
    seed: int,
    timeout_s: float,
) -> None:
    """Measure the table, print it, and write it. Exits with 1 where a text of ours departs."""
    from dovetail.calibration.bench.lossless import NUMERICS, PREEMPTED, WAYS, make_controls, make_texts, measure, rows
    from dovetail.calibration.bench.machine import describe_machine
    from dovetail.calibration.bench.peers.protocol import versions
    from dovetail.runtime.hardware.machine import this_machine

    assert config.threads is not None, "the caller has chosen them"
    manifest = models.artifact.manifest
    context = min(manifest.target.context_length, _CONTEXT)
    texts = make_texts(questions, context - 3 * tokens)  # of two turns, and a neighbour's that goes on a while
    ours = [_dovetail(models, config.with_changes(ctx_size=context, numerics=numerics)) for numerics in NUMERICS]
    engines = ours + [_genai(models, config.with_changes(numerics=numerics), timeout_s) for numerics in NUMERICS]
    count = itertools.count(1)
    total = sum(len(engine.drafts) for engine in engines) * len(WAYS) * len(make_controls(texts))
    with stage("cells") as bar:

        def advance() -> None:
            number = next(count)
            bar.update(number / total, f"{number} of {total}")

        cells = measure(engines, texts, tokens=tokens, seed=seed, advance=advance)
    names = {engine.name for engine in ours}
    own = [cell for cell in cells if cell.engine in names]
    document = {
        "benchmark": "dovetail bench --lossless",
        "format_version": FORMAT_VERSION,
        "command": shlex.join(["dovetail", *sys.argv[1:]]),
        "machine": describe_machine(this_machine(), config.threads),
        "versions": {**this_machine().versions, **versions("openvino-genai")},
        "seed": seed,
        "model": {"name": manifest.name, "digest": models.artifact.digest, "weights": manifest.target.weight_format},
        "workload": {"texts": len(texts), "max_new_tokens": tokens, "ways": list(WAYS)},
        "accepted_tokens": sum(cell.accepted or 0 for cell in own),
        "preemptions": sum(cell.preemptions or 0 for cell in own),
        "cells_not_preempted": sum(cell.way == PREEMPTED and not cell.preemptions for cell in own),
        "departed": sum(len(cell.departed) for cell in own),
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    lines = _markdown(document, rows(cells), cells)
    print("\n".join(lines))
    if output.as_json:
        print_json(document)
    if output.report is not None:
        _write(output.report, lines)
    if document["departed"]:
        notice(f"warning: {document['departed']} texts of ours depart from plain decoding")
        click.get_current_context().exit(1)


def _dovetail(models: Models, config: EngineConfig) -> Engine:
    from dovetail.calibration.bench.lossless import TOGETHER, Engine
    from dovetail.calibration.bench.pipeline_writer import PipelineWriter
    from dovetail.runtime.pipeline import Pipeline

    manifest = models.artifact.manifest
    drafts = {"plain": "none", "lookup": "lookup"}
    if manifest.draft is not None:
        drafts["language model" if manifest.draft.kind == "lm" else f"trained ({manifest.draft.kind})"] = "artifact"

    def open_with(name: str) -> Writer:
        """Trees of the artifact's own shape in every round: an engine that asks only where it pays would show less."""
        tree = manifest.default_tree if drafts[name] == "artifact" else None
        device = config.draft_device if drafts[name] == "artifact" else "auto"
        changes = {"draft": drafts[name], "tree": tree, "draft_device": device, "profile": None}
        return PipelineWriter(Pipeline(models.artifact, config.with_changes(sequences=TOGETHER, **changes)))

    return Engine(f"Dovetail, `{config.numerics}`", list(drafts), open_with)


def _genai(models: Models, config: EngineConfig, timeout_s: float) -> Engine:
    from dovetail.calibration.bench.lossless import ChildWriter, Engine
    from dovetail.calibration.bench.runners import RUNNERS

    model = "draft model" if models.assistant is not None else "itself as draft model"
    drafts = {"plain": "none", "prompt lookup": "lookup", model: "model"}
    command = (sys.executable, "-m", "dovetail.calibration.bench.peers.genai_writer")

    def open_with(name: str) -> Writer:
        has_assistant = drafts[name] == "model" and models.assistant is not None
        options = models.load_options(RUNNERS["genai-draft" if has_assistant else "genai"], config)
        return ChildWriter(command, {**options, "draft": drafts[name]}, timeout_s)

    return Engine(_GENAI_NAMES[config.numerics], list(drafts), open_with)


def _markdown(document: dict[str, Any], table: Sequence[Sequence[str]], cells: Sequence[Cell]) -> list[str]:
    """What stands between the marks of a page, line by line."""
    work, model, machine, versions = (document[key] for key in ("workload", "model", "machine", "versions"))
    software = ", ".join(
        f"{name} {versions[name]}" for name in ("openvino", "onnxruntime", "openvino-genai") if name in versions
    )
    head, *body = table
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if cell.reason is not None:
            reasons.setdefault(cell.reason, []).append(cell.draft)
    return [
        f"{model['name']} ({model['weights']}), {machine['cpu']}, {machine['threads']} threads; {software}.",
        f"{work['texts']} texts of {work['max_new_tokens']} tokens in every way: {' / '.join(work['ways'])}.",
        "One figure: the same in all ways.",
        "",
        f"    {document['command']}",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in body),
        "",
        f"In Dovetail's rows {document['accepted_tokens']:,} drafted tokens were accepted, and texts were preempted "
        f"{document['preemptions']:,} times, in all but {document['cells_not_preempted']} of its cells.",
        *([""] if reasons else []),
        *(f"- {'; '.join(dict.fromkeys(where))}: `{reason}`" for reason, where in reasons.items()),
    ]


def _write(report: Path, lines: Sequence[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    with contextlib.suppress(OSError, ValueError):  # no page yet, or one without marks
        before, rest = report.read_text(encoding="utf-8").split(_MARKS[0])
        _, after = rest.split(_MARKS[1])
        text = f"{before}{_MARKS[0]}{text}{_MARKS[1]}{after}"
    strict_json.write(report, text)
    notice(f"wrote {report}")
