"""A text of several turns: what a new prompt shares with the old text is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from dovetail.runtime.decoding.engine import Engine
from dovetail.runtime.decoding.text_cache import TextCache
from dovetail.runtime.errors import UserError


class Conversation:
    """A cache and the tokens that it holds. Use as a context manager, or `close` it.

    Between two turns its pages may be given to other texts that need them; the next turn then reads its text anew.
    """

    def __init__(self, engine: Engine, cache: TextCache) -> None:
        self.cache = cache
        self._engine = engine
        self._tokens: list[int] = []
        self._is_busy = False  # a stream is making text in it

    def begin(self, prompt: Sequence[int]) -> int:
        """Roll back to what the text shares with `prompt`; returns how many of its tokens need no prefill.

        Raises `UserError` while a stream is open in it.
        """
        self._check_idle()
        self._is_busy = True
        self._engine.take_idle(self)
        kept = self.cache.roll_back(self._tokens, prompt)
        self._tokens = list(prompt)
        return kept

    def end(self, tokens: Sequence[int]) -> None:
        """The turn is over, and `tokens` were emitted in it."""
        self._tokens += tokens
        self._is_busy = False
        self._engine.keep_idle(self)

    def evict(self) -> bool:
        """See `IdleCache`."""
        had_pages = self.cache.target.length > 0
        self.cache.target.truncate(0)
        return had_pages

    def reset(self) -> None:
        """Forget the text. Raises `UserError` while a stream is open in it."""
        with self._engine.lock:
            self._engine.sweep()
            self._check_idle()
            self._engine.take_idle(self)
            self._tokens = []
            self.cache.close()

    def close(self) -> None:
        """Give all memory back. Raises `UserError` while a stream is open in it."""
        self.reset()

    def _check_idle(self) -> None:
        if self._is_busy:
            raise UserError("expected an idle conversation, got one with an open stream; finish or close that first")

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
