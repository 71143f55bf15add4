"""The command `dovetail inspect`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from dovetail.runtime.commands import options
from dovetail.runtime.terminal.console import print_json

if TYPE_CHECKING:
    from dovetail.runtime.artifact.manifest import Manifest, TargetInfo


@click.command()
@click.argument("artifact", type=click.Path())
@click.option("--trust", is_flag=True, help="Skip the hashes of the artifact's files.")
@click.option("--verify", is_flag=True, help="Also render the chat examples and compare with the export's.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
def inspect(artifact: str, trust: bool, verify: bool, as_json: bool) -> None:
    """Show what ARTIFACT holds, and verify every file's hash."""
    opened = options.open_verified(artifact, trust)
    examples = options.replay_chat_examples(opened) if verify else None
    from dovetail.runtime.hardware.machine import this_machine  # only now: the artifact's own faults come first
    from dovetail.runtime.policies.host_profile import profiles_of
    from dovetail.runtime.targets.row_check import kept_records

    profiles, records = profiles_of(opened.digest), kept_records(this_machine(), opened.digest)
    if as_json:
        documents = [dataclasses.asdict(profile) for profile in profiles]
        rows = [dataclasses.asdict(record) for record in records]
        about = {"profiles": documents, "rows": rows, "digest": opened.digest, "verified": not trust}
        about["chat_examples"] = examples
        print_json({**dataclasses.asdict(opened.manifest), **about})
        return
    for name, value in _described(opened.manifest):
        click.echo(f"{name:<14} {value}")
    click.echo(f"{'digest':<14} {opened.digest}")
    click.echo(
        f"{'files':<14} {len(opened.manifest.files)}, {'names and sizes match' if trust else 'every hash matches'}"
    )
    if opened.manifest.checks.warning() is not None:
        click.echo(f"{'warning':<14} {opened.manifest.checks.warning()}")
    for profile in profiles:
        click.echo(f"{'profile':<14} {profile.summary}")
    for record in records:
        click.echo(f"{'rows':<14} {record.check.summary} ({record.how})")
    if examples is not None:
        click.echo(f"{'chat':<14} {f'{examples} examples render as at export' if examples else 'no template'}")


def _forms(target: TargetInfo) -> str:
    """How the weights are stored, where that is more than one form: `keep (Q4_1 79 %, Q8_0 21 %)`."""
    forms = target.weight_forms or {}
    if set(forms) <= {target.weight_format}:
        return ""
    total = sum(forms.values())
    shares = (f"{form} {count / total:.0%}" for form, count in sorted(forms.items(), key=lambda item: -item[1]))
    return f" ({', '.join(shares)})"


def _described(manifest: Manifest) -> list[tuple[str, str]]:
    target, draft, tree, checks = manifest.target, manifest.draft, manifest.default_tree, manifest.checks
    size = sum(entry.bytes for entry in manifest.files.values())
    about_target = [
        f"{target.architecture}, {target.parameters / 1e6:.1f} M parameters, {target.weight_format}{_forms(target)}",
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
