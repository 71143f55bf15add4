"""The `dovetail` command: generate, inspect, and whatever the entry points `dovetail.commands` add."""

from __future__ import annotations

import dataclasses
import secrets
import sys
from typing import TYPE_CHECKING, Any

import click

from dovetail.runtime.commands import options
from dovetail.runtime.commands.answers import Printer, report
from dovetail.runtime.commands.chat import chat
from dovetail.runtime.commands.doctor import doctor
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import Program, print_json, run

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

    from dovetail.runtime.artifact.manifest import Manifest

CONTEXT = {"help_option_names": ["-h", "--help"]}
MAX_PROMPT_FILE_BYTES = 16 << 20


class Commands(Program):
    """Finds further commands by entry point, so that the runtime never imports calibration."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(point.name for point in _entry_points())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        found = [point.load() for point in _entry_points() if point.name == cmd_name]
        return found[0] if found else None


def _entry_points() -> EntryPoints:
    import importlib.metadata  # costs a third of the program's start, and only an unknown or listed command needs it

    return importlib.metadata.entry_points(group="dovetail.commands")


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="dovetail")
def dovetail() -> None:
    """Run large language models on a CPU, several tokens per pass over the weights, without changing a single one."""


@dovetail.command()
@click.argument("artifact", type=click.Path())
@click.argument("prompt", required=False)
@click.option("-f", "--file", "file", type=click.Path(), help="Read the prompt from a file; - is stdin.")
@options.controls
@options.engine
@click.option("--stats", is_flag=True, help="Print a table of what the rounds did.")
@click.option("--show-draft", is_flag=True, help="On a terminal, colour the tokens that the draft had guessed.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
def generate(
    artifact: str,
    prompt: str | None,
    file: str | None,
    stats: bool,
    show_draft: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Continue PROMPT (or a file, or stdin) with the model in ARTIFACT."""
    text = _prompt(prompt, file)
    controls, engine = options.split(given)
    controls.setdefault("seed", secrets.randbits(32))
    pipe = options.open_pipeline(artifact, controls, engine)
    config = pipe.config(**controls)
    results = []
    with pipe.conversation() as conversation:  # further answers find the prompt in the cache
        for sequence in range(config.num_return_sequences):
            if sequence and not as_json:
                click.echo("---")
            stream = pipe.stream(text, config, conversation=conversation, sequence=sequence)
            results.append(Printer(show_draft).show(stream, quiet=as_json))
            report(results[-1], stats)
            if results[-1].finish_reason == "cancelled":
                break
    if as_json:
        first = results[0].as_dict()
        print_json(first if len(results) == 1 else {**first, "sequences": [result.as_dict() for result in results]})
    if results[-1].finish_reason == "cancelled":
        sys.exit(130)


@dovetail.command()
@click.argument("artifact", type=click.Path())
@click.option("--trust", is_flag=True, help="Skip the hashes of the artifact's files.")
@click.option("--verify", is_flag=True, help="Also render the chat examples and compare with the export's.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
def inspect(artifact: str, trust: bool, verify: bool, as_json: bool) -> None:
    """Show what ARTIFACT holds, and verify every file's hash."""
    opened = options.open_verified(artifact, trust)
    examples = options.replay_chat_examples(opened) if verify else None
    from dovetail.runtime.policies.host_profile import profiles_of  # only now: the artifact's own faults come first

    profiles = profiles_of(opened.digest)
    if as_json:
        kept = [dataclasses.asdict(profile) for profile in profiles]
        about = {"profiles": kept, "digest": opened.digest, "verified": not trust, "chat_examples": examples}
        print_json({**dataclasses.asdict(opened.manifest), **about})
        return
    for name, value in _described(opened.manifest):
        click.echo(f"{name:<14} {value}")
    click.echo(f"{'digest':<14} {opened.digest}")
    click.echo(
        f"{'files':<14} {len(opened.manifest.files)}, {'names and sizes match' if trust else 'every hash matches'}"
    )
    for profile in profiles:
        click.echo(f"{'profile':<14} {profile.summary}")
    if examples is not None:
        click.echo(f"{'chat':<14} {f'{examples} examples render as at export' if examples else 'no template'}")


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is not None:
        raise UserError("expected one prompt, got both an argument and --file; drop one")
    if prompt is None and file is None and (sys.stdin is None or sys.stdin.isatty()):
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
    if not prompt:
        raise UserError("expected a prompt, got an empty one; give some text")
    return prompt


def _described(manifest: Manifest) -> list[tuple[str, str]]:
    target, draft, tree, checks = manifest.target, manifest.draft, manifest.default_tree, manifest.checks
    size = sum(entry.bytes for entry in manifest.files.values())
    about_target = [
        f"{target.architecture}, {target.parameters / 1e6:.1f} M parameters, {target.weight_format}",
        f"{target.num_layers} layers of {target.hidden_size}",
        f"vocabulary {target.vocab_size}",
        f"context {target.context_length}",
    ]
    if target.sliding_window is not None:
        about_target.append(f"attention window {target.sliding_window}")
    about_draft = "none"
    if draft is not None:
        about_draft = f"{draft.kind}, {draft.parameters / 1e6:.1f} M parameters, {draft.precision}, "
        about_draft += f"{draft.num_layers} layers, top {draft.top_k}"
        about_draft += f" of {draft.head_size} tokens" if draft.head_size is not None else ""
    about_checks = checks.target_summary()
    if checks.draft_argmax_agreement is not None:
        about_checks += f"; draft {checks.draft_argmax_agreement:.2%}"
    return [
        ("name", f"{manifest.name} (format {manifest.format_version}, {size / 1e6:.1f} MB)"),
        ("target", ", ".join(about_target)),
        ("draft", about_draft),
        ("default tree", f"{tree.nodes} nodes, depth {tree.depth}, width {tree.width}"),
        ("checks", about_checks),
        ("made with", ", ".join(f"{tool} {version}" for tool, version in manifest.tool_versions.items())),
    ]


dovetail.add_command(chat)
dovetail.add_command(doctor)


def main() -> None:
    """Entry point of `dovetail`."""
    run(dovetail, "dovetail")


if __name__ == "__main__":
    main()
