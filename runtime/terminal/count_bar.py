"""A bar for things that are counted, each of which may take long: on a terminal only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dovetail.runtime.terminal.console import on_terminal, stderr_console

Show = Callable[[int, str], None]
"""(how many are done, further figures)."""

_REDRAW_SECONDS = 0.1


@contextmanager
def count_bar(what: str, total: int, done: int) -> Iterator[Show]:
    """Counts `what` from `done` to `total`, with the time that is left by the pace since now."""
    if not on_terminal():
        yield lambda count, figures: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    start = time.monotonic()
    last = 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=stderr_console()) as progress:
        task = progress.add_task(what, total=total, completed=done, figures="")

        def show(count: int, figures: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < _REDRAW_SECONDS and count < total:
                return
            last = now
            if done < count < total:
                figures += f", {_clock((now - start) / (count - done) * (total - count))} left"
            progress.update(task, completed=count, figures=figures)

        yield show


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
