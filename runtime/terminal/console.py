"""What every command shares: errors as one line that names flags, results on stdout, notices on stderr, bars only on a
terminal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from dovetail.runtime.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def run(command: click.Command, name: str) -> None:
    """Run a click command as a program: exit 0 done, 2 the user's mistake in one line, 130 on Ctrl-C; our own faults
    keep their traceback.
    """
    try:
        with logged_as_notices():
            sys.exit(command.main(prog_name=name, standalone_mode=False) or 0)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except click.ClickException as error:
        _fail(f"{error.format_message()}", f"; see {name} --help")
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader went away: nobody to tell, and nothing left to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class Program(click.Group):
    """Commands whose users read of flags where the library's errors name parameters."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            raise UserError(in_flags(str(error), command)) from error


def in_flags(message: str, command: click.Command | None) -> str:
    """`message` with the flags of `command` for the parameters that it names: at its beginning, in backquotes, or
    anywhere if it is no plain word.

        draft_device 'cuda': no GPU; lower ctx_size      ->  --draft-device 'cuda': no GPU; lower --ctx-size
        text: expected 100 tokens; give a longer `text`  ->  --text: expected 100 tokens; give a longer --text
    """
    for parameter in () if command is None else command.params:
        if not isinstance(parameter, click.Option) or parameter.name is None:
            continue
        name, flag = parameter.name, max(parameter.opts, key=len)
        message = re.sub(f"`{name}`|^{name}(?=: | ')", flag, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w./'-]){name}(?![\w/'=-]|\.\w)", flag, message)
    return message


def _fail(message: str, hint: str = "") -> None:
    line = " ".join(message.split()).rstrip(".")
    click.echo(f"error: {line}{hint}", err=True)
    sys.exit(2)


def notice(line: str) -> None:
    """Tell the person, not the pipe."""
    click.echo(line, err=True)


class _Notices(logging.Handler):
    """What is logged, as lines on stderr; warnings say that they are."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one."""
        notice(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")


@contextlib.contextmanager
def logged_as_notices() -> Iterator[None]:
    """While a command runs, tell the person what the library logs: what was chosen, and what went wrong."""
    logger, handler = logging.getLogger("dovetail"), _Notices()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def stderr_console() -> Console:
    """Rich on stderr; plain off a terminal and under NO_COLOR."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(document: dict[str, Any]) -> None:
    """The last line of stdout: one JSON document."""
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))


def on_terminal() -> bool:
    """Whether progress may move on the screen."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """A spinner on a terminal while something takes its time; call what it yields to end it early."""
    if not on_terminal():
        yield lambda: None
        return
    with stderr_console().status(what) as status:
        yield status.stop


@contextlib.contextmanager
def hashing_bar() -> Iterator[Callable[[int], object] | None]:
    """What to tell of bytes hashed so far; shown as a bar on a terminal, once it takes over a second."""
    if not on_terminal():
        yield None
        return
    from rich.progress import Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("verifying hashes: {task.completed:,.0f} bytes"), TransferSpeedColumn()
    progress = Progress(*columns, console=stderr_console(), transient=True)
    task = progress.add_task("", total=None)
    start = time.monotonic()

    def advance(count: int) -> None:
        progress.advance(task, count)
        if time.monotonic() - start > 1:
            progress.start()

    try:
        yield advance
    finally:
        progress.stop()
