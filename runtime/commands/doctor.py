"""The command `dovetail doctor`."""

from __future__ import annotations

import dataclasses

import click

from dovetail.runtime.terminal.console import print_json, waiting


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Make the last line of stdout one JSON document.")
def doctor(as_json: bool) -> None:
    """Show what is usable on this machine, and how to install what is not."""
    with waiting("trying the engines"):
        from dovetail.runtime.hardware.doctor import examine  # only now are the engines imported
        from dovetail.runtime.hardware.machine import this_machine
        from dovetail.runtime.targets.row_check import kept_records

        machine, parts = this_machine(), examine()
        records = kept_records(machine)
    if as_json:
        about = dataclasses.asdict(machine)
        versions = about.pop("versions")
        found = {"parts": [dataclasses.asdict(part) for part in parts]}
        found["rows"] = [dataclasses.asdict(record) for record in records]
        print_json({"machine": about, "versions": versions, **found})
        return
    click.echo(f"{machine.cpu}, {machine.cores} cores for {machine.cpus} allowed CPUs, GPU: {machine.gpu}")
    click.echo(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    for part in parts:
        click.echo(f"{'yes' if part.usable else 'no':<4} {part.name:<20} {part.detail}")
        if part.install:
            click.echo(f"{'':<25} {part.install}")
    for record in records:
        good = "no" if record.check.differing else "yes"
        click.echo(
            f"{good:<4} {'same bytes':<20} artifact {record.artifact[:12]}, {record.how}: {record.check.summary}"
        )
