"""The caches of one text, kept from turn to turn: what a new prompt has in common with the old text is not computed
again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType

from dovetail.runtime.draft import DraftModel, DraftSequence
from dovetail.runtime.target import TargetModel


class Conversation:
    """A target sequence, a draft sequence, and the tokens that both hold. Use as a context manager, or `close` it."""

    def __init__(self, target: TargetModel, draft: DraftModel | None) -> None:
        self.target = target.sequence()
        self.draft: DraftSequence | None = draft.sequence() if draft else None
        self._tokens: list[int] = []

    def rewind(self, prompt: Sequence[int]) -> int:
        """Roll both caches back to what they share with `prompt`; returns how many of its tokens need no prefill.

        The last token is always left to do, and so is one more, because the draft pairs each token with the feature
        of the one before.
        """
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._tokens, prompt[:-1], strict=False))
        kept = min(sum(1 for _ in pairs), self.target.length)
        if self.draft is not None:
            kept = min(kept, self.draft.length)
            self.draft.truncate(kept)
        self.target.truncate(kept)
        self._tokens = list(prompt)
        return kept

    def extend(self, tokens: Sequence[int]) -> None:
        """Note what was emitted."""
        self._tokens += tokens

    def reset(self) -> None:
        """Forget the text."""
        self.rewind([0])

    def close(self) -> None:
        """Give the target's blocks back."""
        self._tokens = []
        self.target.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
