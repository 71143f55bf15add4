"""Stop strings: found across token and chunk borders, and no piece of one shown before it is known not to be one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


class StopScanner:
    """Passes text through until the first stop string."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        """`include`: whether the stop string itself belongs to the text."""
        self._stops = stops
        self._include = include
        self._held = ""
        self._is_shown = bytearray()  # a byte for each character that is held
        self.found = False

    def feed(self, piece: str, hidden: str = "") -> str:
        """What of the text so far may be shown now. After a stop string was found, nothing more is.

        `hidden` text follows the piece: it belongs to the text in which stop strings are looked for, and is never
        shown.
        """
        if self.found:
            return ""
        if not self._stops:
            return piece
        self._held += piece + hidden
        self._is_shown += b"\1" * len(piece) + b"\0" * len(hidden)
        hits = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            end, at = min(hits)  # the first to be complete, however the text was cut into pieces
            self.found = True
            return self._let_out(end if self._include else at)
        overlap = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._let_out(len(self._held) - overlap)

    def finish(self) -> str:
        """The text ends here: what was held back is no stop string."""
        return "" if self.found else self._let_out(len(self._held))

    def _let_out(self, count: int) -> str:
        """The first `count` characters, but for the hidden ones; they are not held any longer."""
        shown = "".join(itertools.compress(self._held[:count], self._is_shown))
        self._held, self._is_shown = self._held[count:], self._is_shown[count:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
