"""The `dovetail` command: generate, batch, inspect, ..., and whatever the entry points `dovetail.commands` add."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dovetail.runtime.commands.batch import batch
from dovetail.runtime.commands.chat import chat
from dovetail.runtime.commands.doctor import doctor
from dovetail.runtime.commands.generate import generate
from dovetail.runtime.commands.inspect import inspect
from dovetail.runtime.terminal.console import Program, run

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

CONTEXT = {"help_option_names": ["-h", "--help"]}


class Commands(Program):
    """Finds further commands by entry point, so that the runtime never imports calibration."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(point.name for point in _entry_points())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        added = [point.load() for point in _entry_points() if point.name == cmd_name]
        return added[0] if added else None


def _entry_points() -> EntryPoints:
    import importlib.metadata  # costs a third of the program's start, and only an unknown or listed command needs it

    return importlib.metadata.entry_points(group="dovetail.commands")


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="dovetail")
def dovetail() -> None:
    """Run large language models on a CPU, several tokens per pass over the weights, without changing a single one."""


for command in (generate, chat, batch, inspect, doctor):
    dovetail.add_command(command)


def main() -> None:
    """Entry point of `dovetail`."""
    run(dovetail, "dovetail")


if __name__ == "__main__":
    main()
