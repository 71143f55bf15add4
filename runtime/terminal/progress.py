"""Progress on stderr: a rich bar on a terminal, one plain line a minute elsewhere (logs, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from dovetail.runtime.terminal.console import stderr_console

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_LINE_SECONDS = 60.0


class ProgressLine(Protocol):
    """Where a long stage says how far it is."""

    def update(self, fraction: float, text: str) -> None:
        """`fraction` of the stage done, in 0..1, and the figures worth a look."""


class _Bar:
    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=1.0, figures="")

    def update(self, fraction: float, text: str) -> None:
        self._progress.update(self._task, completed=min(1.0, fraction), figures=text)


class _PlainLines:
    def __init__(self, name: str) -> None:
        self._name, self._start, self._last = name, time.monotonic(), -PLAIN_LINE_SECONDS
        self._start_fraction: float | None = None

    def update(self, fraction: float, text: str) -> None:
        now = time.monotonic()
        if self._start_fraction is None:
            self._start_fraction = fraction
        if now - self._last < PLAIN_LINE_SECONDS and fraction < 1:
            return
        self._last = now
        gained = fraction - self._start_fraction
        eta = f", {(now - self._start) / gained * max(0.0, 1 - fraction) / 60:.1f} min left" if gained > 1e-6 else ""
        print(f"{self._name}: {100 * min(1.0, fraction):.1f} %{eta}, {text}", file=sys.stderr, flush=True)


@contextmanager
def stage(name: str) -> Iterator[ProgressLine]:
    """A named stage with a bar on a terminal; off one, sparse plain lines."""
    console = stderr_console()
    if not console.is_terminal:
        yield _PlainLines(name)
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=console) as progress:
        yield _Bar(progress, name)
