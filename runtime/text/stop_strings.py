"""Stop strings: found across token and chunk borders, and no piece of one shown before it is known not to be one."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text through until the first stop string."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        """`include`: whether the stop string itself belongs to the text."""
        self._stops = stops
        self._include = include
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """What of the text so far may be shown now. After a stop string was found, nothing more is."""
        if self.found:
            return ""
        self._held += piece
        hits = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            end, at = min(hits)  # the first to be complete, however the text was cut into pieces
            self.found = True
            return self._held[: end if self._include else at]
        overlap = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - overlap]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """The text ends here: what was held back is no stop string."""
        rest, self._held = ("" if self.found else self._held), ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
