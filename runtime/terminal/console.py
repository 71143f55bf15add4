"""What every command shares: errors as one line that names flags, results on stdout, notices on stderr, bars only on a
terminal.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dovetail.runtime.artifact.strict_json import printable
from dovetail.runtime.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def run(command: click.Command, name: str) -> None:
    """Run a click command as a program: exit 0 done, 2 the user's mistake in one line, 128 and the signal's number when
    it was stopped; our own faults keep their traceback.
    """
    try:
        _need_standard_files()
        with ended_by_signals(), logged_as_notices():
            code = command.main(prog_name=name, standalone_mode=False) or 0
            sys.stdout.flush()
            sys.exit(code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _fail(f"{error.format_message()}", f"; see {name} --help")
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _reader_is_gone()
        if not is_of_a_file(error):
            raise
        _redirect(1)  # if it was stdout: what is left can't be written at the program's end, either
        _fail(about_file(error))


def _need_standard_files() -> None:
    """Raise `UserError` without a stdout. What else is closed is opened on nothing: the next file to be opened would
    get its number, and whatever a library prints there.
    """
    for number in (0, 2):
        try:
            os.fstat(number)
        except OSError:
            _redirect(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the program
    if sys.stdout is None:
        _redirect(1)
        raise UserError("expected a stdout to write to, got a closed one; redirect it, for example to /dev/null")


def _redirect(number: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)


def _reader_is_gone() -> NoReturn:
    """Behind `| head`: nobody to tell, and nothing left to flush."""
    _redirect(1)
    sys.exit(128 + signal.SIGPIPE)


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, then run the command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "mend its permissions, or choose another place"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG), "check the path"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk, then run the command again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
}


def is_of_a_file(error: OSError) -> bool:
    """Whether `error` is about a file or a disk, as far as it says so, and so the user's to mend."""
    is_of_a_disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    return error.errno in _REMEDIES and (is_of_a_disk or error.filename is not None)


def about_file(error: OSError) -> str:
    """One line for an error of a file."""
    where = "stdout and files that" if error.filename is None else f"a file {os.fsdecode(error.filename)} that"
    return f"expected {where} can be read or written, got: {error.strerror}; {_REMEDIES[error.errno or 0]}"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as an exit does, so that what is half done is tidied up; a second one ends it
    at once. Those that are ignored or handled already stay so.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may be told of signals
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


class Program(click.Group):
    """Commands whose users read of flags where the library's errors name parameters."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click has an exit code of its own for it
            _reader_is_gone()
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
    notice(f"error: {line}{hint}")
    sys.exit(2)


def notice(text: str) -> None:
    """Tell the person, not the pipe. Nobody may listen; the work goes on. What a terminal would obey is not shown:
    names and texts of files are in it.
    """
    with contextlib.suppress(OSError):
        click.echo("\n".join(map(printable, text.split("\n"))), err=True)


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
