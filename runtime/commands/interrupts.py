"""Ctrl-C and SIGTERM for commands that end between two steps rather than anywhere."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """A context manager in which both signals are the same. The first of them raises `KeyboardInterrupt`, or only sets
    `is_asked` while `is_patient` is set; the second one always raises.
    """

    def __init__(self) -> None:
        self.is_patient = False
        self.is_asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        was_asked, self.is_asked = self.is_asked, True
        if was_asked or not self.is_patient:
            raise KeyboardInterrupt
