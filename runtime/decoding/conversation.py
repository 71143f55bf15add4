"""A text of several turns: what a new prompt shares with the old text is not computed again."""

from __future__ import annotations

from collections.abc import Sequence as Items
from types import TracebackType

from dovetail.runtime.decoding.engine import Engine
from dovetail.runtime.decoding.sequence import Sequence
from dovetail.runtime.decoding.text_cache import TextCache, shared_length
from dovetail.runtime.errors import UserError


class Conversation:
    """A cache and the tokens that it holds. Use as a context manager, or `close` it.

    Between two turns its pages may be given to other texts that need them; the next turn then reads its text anew, what
    was drawn in it as it was drawn (see `Step.is_prompt`): so its answers are the same in either case.
    """

    def __init__(self, engine: Engine, cache: TextCache) -> None:
        self.cache = cache
        self._engine = engine
        self.drawn: list[range] = []  # positions of the answers so far, as far as they count
        self._tokens: list[int] = []
        self._making: Sequence | None = None  # what a stream is making in it
        self._is_closing = False  # as soon as that has ended

    def belongs_to(self, engine: Engine) -> bool:
        """Whether its caches are those of `engine`."""
        return self._engine is engine

    def begin(self, sequence: Sequence) -> int:
        """Roll back to what the text shares with the prompt of `sequence`, which is made in it from now on; returns how
        many of its tokens need no prefill.

        Raises `UserError` while a stream is open in it.
        """
        self._check_idle()
        self._engine.take_idle(self)
        prompt = sequence.text
        length = shared_length(self._tokens, prompt)
        self.drawn = [range(span.start, min(span.stop, length)) for span in self.drawn if span.start < length]
        self._tokens = list(prompt)
        try:
            self.cache.roll_back(length)
            self.cache.target.set_text_length(len(prompt))
        except BaseException:  # what it holds is not known: the next turn begins anew
            self._forget()
            raise
        self._making = sequence
        return self.cache.target.length

    def end(self, tokens: Items[int]) -> None:
        """The turn is over, and `tokens` were emitted in it."""
        if tokens:
            self.drawn.append(range(len(self._tokens), len(self._tokens) + len(tokens)))
        self._tokens += tokens
        self._making = None
        self._engine.keep_idle(self)
        if self._is_closing:
            self._forget()

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
            self._forget()

    def close(self) -> None:
        """Give all memory back. A text that is being made in it ends as cancelled, behind a step that is under way."""
        with self._engine.lock:
            if self._making is not None:
                self._is_closing = True
                self._making.is_cancelled = True
                self._engine.sweep()
            else:
                self._forget()

    def _forget(self) -> None:
        self._is_closing = False
        self._engine.take_idle(self)
        self._tokens, self.drawn = [], []
        self.cache.close()

    def _check_idle(self) -> None:
        if self._making is not None:
            raise UserError("expected an idle conversation, got one with an open stream; finish or close that first")

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
