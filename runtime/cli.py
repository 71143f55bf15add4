"""The `dovetail` command: generate, inspect, and whatever the entry points `dovetail.commands` add."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import secrets
import sys
from typing import TYPE_CHECKING, Any

import click
from dovetail.runtime.console import notice, print_json, run, stderr_console
from dovetail.runtime.errors import UserError

if TYPE_CHECKING:
    from dovetail.runtime.generation import Generation
    from dovetail.runtime.manifest import Manifest, TreeShape

CONTEXT = {"help_option_names": ["-h", "--help"]}
MAX_PROMPT_FILE_BYTES = 16 << 20


class Commands(click.Group):
    """Finds further commands by entry point, so that the runtime never imports calibration."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(point.name for point in _entry_points())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        found = [point.load() for point in _entry_points() if point.name == cmd_name]
        return found[0] if found else None


def _entry_points() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group="dovetail.commands")


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="dovetail")
def dovetail() -> None:
    """Run large language models on a CPU, several tokens per pass over the weights, without changing a single one."""


@dovetail.command()
@click.argument("artifact", type=click.Path())
@click.argument("prompt", required=False)
@click.option("-f", "--file", "file", type=click.Path(), help="Read the prompt from a file; - is stdin.")
@click.option(
    "-n", "--max-new-tokens", type=int, help="Tokens to generate.  [default: 256, or what the context leaves]"
)
@click.option(
    "--temperature", type=float, help="0 decodes greedily.  [default: the artifact's generation_config.json, else 0]"
)
@click.option(
    "--top-k", type=int, help="Keep the K most likely tokens; 0 keeps all.  [default: the artifact's, else 0]"
)
@click.option("--top-p", type=float, help="Keep the smallest set of this mass.  [default: the artifact's, else 1]")
@click.option("--seed", type=int, help="Same seed, same text.  [default: random, and reported]")
@click.option("--ignore-eos", is_flag=True, help="Go on behind the end-of-sequence token.")
@click.option(
    "--draft",
    type=click.Choice(["artifact", "none"]),
    default="artifact",
    show_default=True,
    help="Which draft guesses ahead.",
)
@click.option("--no-draft", is_flag=True, help="Plain decoding; the same as --draft none.")
@click.option("--draft-device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:INDEX.")
@click.option("--exact", is_flag=True, help="Token-identical to decoding one token at a time; slower.")
@click.option(
    "--tree-nodes",
    type=click.IntRange(1, 128),
    help="Nodes of the tree that a pass verifies, the root counted.  [default: the artifact's]",
)
@click.option("--tree-depth", type=click.IntRange(0, 64), help="Levels that are drafted.  [default: the artifact's]")
@click.option(
    "--tree-width", type=click.IntRange(1, 64), help="Children tried per node and level.  [default: the artifact's]"
)
@click.option(
    "-t", "--threads", type=int, help="CPU threads.  [default: cores, affinity or container quota, whichever is least]"
)
@click.option(
    "-c", "--ctx-size", type=int, help="Room for prompt and answer, in tokens.  [default: the model's context]"
)
@click.option("--trust", is_flag=True, help="Skip the hashes of the artifact's files.")
@click.option("--stats", is_flag=True, help="Print a table of what the rounds did.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
def generate(
    artifact: str,
    prompt: str | None,
    file: str | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    ignore_eos: bool,
    draft: str,
    no_draft: bool,
    draft_device: str,
    exact: bool,
    tree_nodes: int | None,
    tree_depth: int | None,
    tree_width: int | None,
    threads: int | None,
    ctx_size: int | None,
    trust: bool,
    stats: bool,
    as_json: bool,
) -> None:
    """Continue PROMPT (or a file, or stdin) with the model in ARTIFACT."""
    text = _prompt(prompt, file)
    if trust:
        notice("the artifact's hashes are not checked (--trust)")
    opened = _open(artifact, trust)

    # From here on the artifact is what its manifest says; only now are numpy and the engines imported.
    from dovetail.runtime.pipeline import Pipeline
    from dovetail.runtime.sampling import SamplingParams

    tree = _tree(opened.manifest.default_tree, tree_nodes, tree_depth, tree_width)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    seed = secrets.randbits(32) if seed is None else seed
    SamplingParams(**{k: v for k, v in given.items() if v is not None}, seed=seed)  # type: ignore[arg-type]  # refused before loading
    pipe = Pipeline(
        opened,
        draft="none" if no_draft or draft == "none" else "artifact",
        draft_device=draft_device,
        numerics="exact" if exact else "fast",
        threads=threads,
        ctx_size=ctx_size,
        tree=tree,
        notice=notice,
    )
    stream = pipe.stream(
        text, pipe.sampling_params(seed=seed, **given), max_new_tokens=max_new_tokens, ignore_eos=ignore_eos
    )
    interrupted = False
    try:
        for chunk in stream:
            if not as_json:
                click.echo(chunk.text, nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
        stream.close()
    result = stream.finish()
    if as_json:
        print_json(result.as_dict())
    else:
        click.echo()
    _summary(result, stats)
    if interrupted:
        sys.exit(130)


@dovetail.command()
@click.argument("artifact", type=click.Path())
@click.option("--trust", is_flag=True, help="Skip the hashes of the artifact's files.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
def inspect(artifact: str, trust: bool, as_json: bool) -> None:
    """Show what ARTIFACT holds, and verify every file's hash."""
    if trust:
        notice("the artifact's hashes are not checked (--trust)")
    opened = _open(artifact, trust)
    if as_json:
        print_json({**dataclasses.asdict(opened.manifest), "digest": opened.digest, "verified": not trust})
        return
    for name, value in _described(opened.manifest):
        click.echo(f"{name:<14} {value}")
    click.echo(f"{'digest':<14} {opened.digest}")
    click.echo(
        f"{'files':<14} {len(opened.manifest.files)}, {'names and sizes match' if trust else 'every hash matches'}"
    )


def _open(path: str, trust: bool) -> Any:
    """Open the artifact, hashes checked (with a bar where that takes a while), before anything native is imported."""
    from dovetail.runtime.artifact import open_artifact

    return open_artifact(path, trust=trust)


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is not None:
        raise UserError("expected one prompt, got both an argument and --file; drop one")
    if prompt is None and file is None and sys.stdin.isatty():
        raise UserError("expected a prompt, got none; pass it as an argument, with --file, or on stdin")
    if prompt is None or (prompt == "-" and file is None):
        try:
            if file in (None, "-"):
                data = sys.stdin.buffer.read(MAX_PROMPT_FILE_BYTES + 1)
            else:
                assert file is not None
                with open(file, "rb") as handle:
                    data = handle.read(MAX_PROMPT_FILE_BYTES + 1)
            prompt = data.decode()
        except OSError as error:
            raise UserError(f"--file {file}: expected a readable file, got {error.strerror}; check the path") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"expected a prompt in UTF-8, got {error.reason} at byte {error.start}; convert it"
            ) from None
        if len(data) > MAX_PROMPT_FILE_BYTES:
            raise UserError(f"expected a prompt of at most {MAX_PROMPT_FILE_BYTES} bytes, got more; shorten it")
    if not prompt.strip():
        raise UserError("expected a prompt, got an empty one; give some text")
    return prompt


def _tree(default: TreeShape, nodes: int | None, depth: int | None, width: int | None) -> TreeShape:
    given = {"nodes": nodes, "depth": depth, "width": width}
    return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})


def _summary(result: Generation, stats: bool) -> None:
    """One line on stderr, or the table of `--stats`."""
    totals = result.totals
    n = len(result.token_ids)
    notice(
        f"{n} tokens in {result.decode_ms / 1e3:.2f} s, {result.tokens_per_second:.1f} tokens/s, "
        f"accept length {totals.accept_length_mean:.2f}, seed {result.seed}"
    )
    if not stats:
        return
    from rich.table import Table

    table = Table(show_header=False)
    per_round = max(1, totals.rounds)
    rows = {
        "prompt / generated": f"{result.prompt_tokens} / {n} tokens ({result.finish_reason})",
        "prefill": f"{result.prefill_ms:.1f} ms",
        "decode": f"{result.decode_ms:.1f} ms, {result.tokens_per_second:.1f} tokens/s",
        "rounds": f"{totals.rounds}, {n / per_round:.2f} tokens each",
        "accept length": f"{totals.accept_length_mean:.2f} of {totals.drafted_tokens / per_round:.1f} drafted",
        "accept histogram": "  ".join(f"{a}:{count}" for a, count in enumerate(totals.accept_histogram)),
        "verify_ms": f"{totals.verify_ms / per_round:.2f} a round on {result.target_device}",
        "draft_ms": f"{totals.draft_ms / per_round:.2f} a round on {result.draft_device}",
        "host_ms": f"{totals.host_ms / per_round:.2f} a round",
        "bytes to draft": f"{result.bytes_to_draft / per_round:.0f} a round",
        "bytes from draft": f"{result.bytes_from_draft / per_round:.0f} a round",
        "numerics": f"{result.numerics}, {result.threads} threads",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    stderr_console().print(table)


def _described(manifest: Manifest) -> list[tuple[str, str]]:
    target, draft, tree, checks = manifest.target, manifest.draft, manifest.default_tree, manifest.checks
    size = sum(entry.bytes for entry in manifest.files.values())
    about_target = [
        f"{target.architecture}, {target.parameters / 1e6:.1f} M parameters, {target.weight_format}",
        f"{target.num_layers} layers of {target.hidden_size}",
        f"vocabulary {target.vocab_size}",
        f"context {target.context_length}",
    ]
    about_draft = "none"
    if draft is not None:
        about_draft = f"{draft.kind}, {draft.parameters / 1e6:.1f} M parameters, {draft.precision}, "
        about_draft += f"{draft.num_layers} layers, top {draft.top_k}"
    about_checks = f"mean KL {checks.target_kl_mean:.5f} nats, argmax agreement {checks.target_argmax_agreement:.2%}"
    about_checks += f" over {checks.tokens} tokens"
    if checks.draft_max_difference is not None:
        about_checks += f"; draft within {checks.draft_max_difference:.2g}"
    return [
        ("name", f"{manifest.name} (format {manifest.format_version}, {size / 1e6:.1f} MB)"),
        ("target", ", ".join(about_target)),
        ("draft", about_draft),
        ("default tree", f"{tree.nodes} nodes, depth {tree.depth}, width {tree.width}"),
        ("checks", about_checks),
        ("made with", ", ".join(f"{tool} {version}" for tool, version in manifest.tool_versions.items())),
    ]


def main() -> None:
    """Entry point of `dovetail`."""
    run(dovetail, "dovetail")


if __name__ == "__main__":
    main()
