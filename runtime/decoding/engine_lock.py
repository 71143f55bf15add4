"""Who may use the engines now: one text at a time."""

from __future__ import annotations

import threading

from dovetail.runtime.errors import UserError


class Turns:
    """A lock that is held by a stream. Other threads wait for it; the thread that reads the stream would wait for
    itself, and is refused instead.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def begin(self) -> None:
        """Wait for the engines. Raises `UserError` in the thread whose stream has them."""
        if self._holder == threading.get_ident():
            raise UserError("expected an idle pipeline, got one with an open stream; finish or close that first")
        self._lock.acquire()
        self.touch()

    def touch(self) -> None:
        """The holder is read from this thread now."""
        self._holder = threading.get_ident()

    def end(self) -> None:
        """Let the next one in."""
        self._holder = None
        self._lock.release()
