"""The `dovetail-export` command: model, draft, inflate, demo. Exit 0 done, 2 the user's mistake (one line), 1 ours."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import Program, notice, print_json, run

if TYPE_CHECKING:
    from dovetail.runtime.artifact.manifest import Manifest

_JSON = click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
_FORCE = click.option("--force", is_flag=True, help="Replace what is there, at the very end and in one step.")
_PATH = click.Path(path_type=Path)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dovetail")
def dovetail_export() -> None:
    """Compile a checkpoint and its draft to an artifact that `dovetail` runs without PyTorch."""


@dovetail_export.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--out", required=True, type=_PATH, help="The artifact folder to write.")
@click.option("--revision", help="Branch, tag or commit of a hub id. [default: its main branch]")
@click.option("--allow-pickle", is_flag=True, help="Take pickled weights (.bin) where there are no safetensors.")
@click.option("--draft", type=_PATH, help="A draft folder (docs/drafts.md), or a small language model's .gguf file.")
@click.option(
    "--weight-format",
    help="int8, int8_asym, int4, fp16, fp32, or of a GGUF keep. [default: int8; a GGUF's blocks, an IR's own]",
)
@click.option("--group-size", type=int, help="int4: inputs that share a scale. [default: 32; chosen by data: 128]")
@click.option(
    "--int8-share", default=0.0, help="int4, by nncf: share of weights that stay in 8 bits, the sensitive ones."
)
@click.option("--calibration-text", type=_PATH, help="int4: choose scales by what the model does on this text (AWQ).")
@click.option(
    "--draft-weight-format",
    default="int8",
    show_default=True,
    type=click.Choice(["int8", "int4", "float16", "float32"]),
    help="int8 is the fastest on a CPU; int4: LM head and fusion in 4 bits, for little memory.",
)
@click.option("--draft-vocab", type=int, help="Keep this many tokens in the draft's LM head, the most frequent ones.")
@click.option(
    "--draft-vocab-text",
    "draft_vocab_texts",
    multiple=True,
    type=_PATH,
    help="Text file or folder to count tokens in, such as the model will write; may be repeated. "
    "[default: this Python's own source]",
)
@click.option(
    "--check-text", type=_PATH, help="A text file to compare with the source on. [default: this Python's own source]"
)
@click.option("--tree", help="Default tree as NODES,DEPTH,WIDTH, written into the artifact.")
@_FORCE
@_JSON
def model(
    source: str,
    out: Path,
    revision: str | None,
    allow_pickle: bool,
    draft: Path | None,
    weight_format: str | None,
    group_size: int | None,
    int8_share: float,
    calibration_text: Path | None,
    draft_weight_format: Any,
    draft_vocab: int | None,
    draft_vocab_texts: tuple[Path, ...],
    check_text: Path | None,
    tree: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compile SRC to the artifact OUT. SRC is a checkpoint folder, a GGUF file, the folder of an OpenVINO IR, or a hub
    id.
    """
    from dovetail.export.artifact.writing import write_artifact

    manifest = write_artifact(
        source,
        out,
        revision=revision,
        allow_pickle=allow_pickle,
        draft=draft,
        weight_format=weight_format,
        group_size=group_size,
        int8_share=int8_share,
        calibration_text=None if calibration_text is None else _text(calibration_text, "--calibration-text"),
        draft_weight_format=draft_weight_format,
        draft_vocab=draft_vocab,
        draft_vocab_texts=draft_vocab_texts,
        tree=_tree(tree),
        check_text=None if check_text is None else _text(check_text, "--check-text"),
        force=force,
    )
    _report(out, manifest, as_json)


@dovetail_export.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--out", required=True, type=_PATH, help="The draft folder to write.")
@click.option(
    "--prompts",
    multiple=True,
    type=_PATH,
    help="Learn from SRC's own answers to the questions in this file, JSON lines as bench reads them; may be repeated.",
)
@click.option(
    "--self-made", default=0, help="Learn from so many questions that SRC makes up itself, and its answers to them."
)
@click.option(
    "--text", "texts", multiple=True, type=_PATH, help="Learn from a text file, or all in a folder; may be repeated."
)
@click.option(
    "--max-tokens",
    default=2_000_000,
    show_default=True,
    help="Of --text: learn from so many. Each takes 2 x hidden size + 192 bytes in --work.",
)
@click.option(
    "--kind",
    default="dgf",
    show_default=True,
    type=click.Choice(["dgf", "eagle", "eagle3"]),
    help="How feature and token are joined, and what is learnt (docs/drafts.md).",
)
@click.option("--blocks", default=2, show_default=True, help="Llama blocks behind the fusion.")
@click.option("--vocab", type=int, help="Only so many tokens in its LM head, the most frequent ones it learns from.")
@click.option("--minutes", default=60.0, show_default=True, help="How long to train.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--soft-weight",
    default=0.1,
    show_default=True,
    help="Weight of the cross-entropy against the target's soft output.",
)
@click.option(
    "--noise", default=0.1, show_default=True, help="Half-width of the uniform noise on the target's features."
)
@click.option("--unroll", default=3, show_default=True, help="Levels trained on the draft's own features.")
@click.option("--window", default=256, show_default=True, help="Tokens in a training window.")
@click.option("--windows", default=8, show_default=True, help="Windows in a step.")
@click.option("--work", type=_PATH, help="Where answers, features and a stopped run are kept. [default: beside OUT]")
@_FORCE
@_JSON
def draft(
    source: str,
    out: Path,
    prompts: tuple[Path, ...],
    self_made: int,
    texts: tuple[Path, ...],
    max_tokens: int,
    work: Path | None,
    force: bool,
    as_json: bool,
    **recipe: Any,
) -> None:
    """Train a draft for SRC, of any kind that `model` takes: a chat model's on its own answers to --prompts and to
    questions that are --self-made, another one's on --text.
    """
    from dovetail.export.artifact.atomic_folder import appearing, check_goal
    from dovetail.export.sources.finding import find_source
    from dovetail.export.training.draft import DraftRecipe, train_draft
    from dovetail.export.training.material import make_material

    settings = DraftRecipe(**recipe)
    check_goal(out, force)
    work_folder = work or out.absolute().parent / f".{out.name}.work"
    target = find_source(source)
    material = make_material(target, prompts, self_made, texts, work_folder, max_tokens)
    with _training(), appearing(out, force) as folder:
        report = train_draft(target, material, folder, settings, work=work_folder)
    if work is None:
        shutil.rmtree(work_folder, ignore_errors=True)
    click.echo(f"{out}: {report.parameters / 1e6:.2f} M parameters after {report.steps} steps")
    click.echo("held-out top-1 agreement by depth: " + " ".join(f"{share:.3f}" for share in report.agreement))
    if as_json:
        print_json(dataclasses.asdict(report))


@dovetail_export.command()
@click.argument("source", metavar="SRC", type=_PATH)
@click.option("-o", "--out", required=True, type=_PATH, help="The checkpoint folder to write.")
@click.option(
    "--like", required=True, metavar="SHAPE", help="llama-68m ... llama-7b, smollm2-1.7b, or a folder with config.json."
)
@click.option("--draft", type=_PATH, help="The draft folder of SRC, to grow with it.")
@click.option("--draft-output", "draft_out", type=_PATH, help="The draft folder to write.")
@click.option(
    "--dtype",
    default="float16",
    show_default=True,
    type=click.Choice(["float16", "float32"]),
    help="float32: INT8 weights become the very ones of SRC; float16: half the disk.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random weights that are added.")
@_FORCE
@_JSON
def inflate(out: Path, draft: Path | None, draft_out: Path | None, as_json: bool, **settings: Any) -> None:
    """Write the Llama checkpoint SRC in a bigger model's shape: the same text, at the big one's cost."""
    from dovetail.export.inflate import inflate as inflation

    if (draft is None) != (draft_out is None):
        raise UserError("expected --draft and --draft-output together, got one of them; give both or none")
    report = inflation.inflate(out=out, draft=draft, draft_out=draft_out, **settings)
    for folder, parameters, agreement in (
        (out, report.parameters, report.target),
        (draft_out, report.draft_parameters, report.draft),
    ):
        if parameters is not None and agreement is not None:
            click.echo(
                f"{folder}: {parameters / 1e6:.1f} M parameters; logits within {agreement.largest_difference:.2g} of "
                f"the source's (up to {agreement.largest_logit:.3g}), argmax agreement "
                f"{agreement.argmax_agreement:.2%} over {agreement.tokens} held-out tokens"
            )
    click.echo(f"text and acceptance are those of {report.source}, cost is that of {report.like}")
    if as_json:
        print_json(dataclasses.asdict(report))


@dovetail_export.command()
@click.option("-o", "--out", required=True, type=_PATH, help="The artifact folder to write.")
@click.option("--minutes-target", default=90.0, show_default=True, help="How long to train the target.")
@click.option("--minutes-draft", default=30.0, show_default=True, help="How long to train the draft.")
@click.option("--seed", default=0, show_default=True)
@click.option("--work", type=_PATH, help="Where a stopped run is kept to go on from. [default: beside OUT]")
@click.option("--warm-start", type=_PATH, help="A checkpoint folder whose weights and tokenizer to begin with.")
@click.option("--warm-start-minutes", default=0.0, help="How long that was trained, for the model card.")
@click.option("--tree", help="Default tree as NODES,DEPTH,WIDTH, written into the artifact.")
@_FORCE
@_JSON
def demo(out: Path, work: Path | None, tree: str | None, force: bool, as_json: bool, **recipe: Any) -> None:
    """Make the small artifact that ships, from the running Python's standard library."""
    from dovetail.export.demo.acceptance import measure_acceptance
    from dovetail.export.demo.demo import DemoRecipe, make_demo

    work_folder = work or out.absolute().parent / f".{out.name}.work"
    with _training():
        manifest = make_demo(
            out, work_folder, DemoRecipe(**recipe), tree=_tree(tree), measure=measure_acceptance, force=force
        )
    if work is None:
        shutil.rmtree(work_folder, ignore_errors=True)
    _report(out, manifest, as_json)


def _tree(text: str | None) -> Any:
    from dovetail.runtime.trees.shape import TreeShape

    if text is None:
        return None
    try:
        nodes, depth, width = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"expected --tree NODES,DEPTH,WIDTH, got {text!r}; for example 12,5,4") from None
    return TreeShape(nodes, depth, width)


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a UTF-8 text file, got {path} ({error}); check {option}") from None


class _training:  # a context manager, named as it reads
    """The process trains, and nothing else: memory is kept for the next step. SIGTERM and SIGINT: the checkpoint is
    written, one line says how to go on, exit 128 + signal.
    """

    def __enter__(self) -> None:
        from dovetail.export.training.loop import keep_freed_memory

        keep_freed_memory()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from dovetail.export.training.loop import TrainingStoppedError

        if isinstance(error, TrainingStoppedError):
            notice(str(error))
            sys.exit(error.exit_code)


def _report(out: Path, manifest: Manifest, as_json: bool) -> None:
    checks, size = manifest.checks, sum(entry.bytes for entry in manifest.files.values())
    click.echo(
        f"{out}: {size / 1e6:.1f} MB, {manifest.target.parameters / 1e6:.1f} M parameters as "
        f"{manifest.target.weight_format}"
    )
    click.echo(f"target on held-out text: {checks.target_summary()}")
    if checks.warning() is not None:
        notice(f"warning: {checks.warning()}")
    if checks.draft_argmax_agreement is not None:
        click.echo(f"draft against its float32 weights: first children agree to {checks.draft_argmax_agreement:.2%}")
    if as_json:
        print_json(dataclasses.asdict(manifest))


def main() -> None:
    """Entry point of `dovetail-export`."""
    # Threads that spin at every barrier of a training step starve each other on a machine that does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    run(dovetail_export, "dovetail-export")


if __name__ == "__main__":
    main()
