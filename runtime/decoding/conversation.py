"""The caches of one text, kept from turn to turn: what a new prompt shares with the old text is not computed again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType

from dovetail.runtime.drafts.base import Draft, NoDraft, RewindableDraft
from dovetail.runtime.drafts.guard import GuardedDraft
from dovetail.runtime.drafts.lookup_or_model import MixedDraft
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.errors import UserError
from dovetail.runtime.targets.openvino.engine import TargetModel


class Conversation:
    """A target sequence, its drafts, and the tokens that all hold. Use as a context manager, or `close` it."""

    def __init__(
        self,
        target: TargetModel,
        draft: RewindableDraft | None,
        *,
        lookup: LookupDraft | None = None,
    ) -> None:
        """`lookup` offers matches before `draft` is asked."""
        self.target = target.sequence()
        self.guard = GuardedDraft(draft or NoDraft())
        self.draft: Draft = self.guard if lookup is None else MixedDraft(self.guard, lookup)
        self._sequence, self._lookup = draft, lookup
        self._tokens: list[int] = []
        self.busy = False  # a stream is making text in it

    def begin(self, prompt: Sequence[int], room: int) -> int:
        """Roll all caches back to what they share with `prompt`, and make room for `room` tokens behind it.

        Returns how many tokens of the prompt need no prefill. One less than are shared: the draft's last pair holds a
        feature of the shared text together with the token that follows. Raises `ContextOverflowError`.
        """
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        kept = min(max(shared - 1, 0), self.target.length)
        drafts = self._drafts()
        kept = min([kept, *(draft.known for draft in drafts)])
        for draft in drafts:
            draft.truncate(kept)
        self.guard.begin()
        self.target.truncate(kept)
        self.target.reserve(len(prompt) - kept + room)
        self._tokens = list(prompt)
        return kept

    def extend(self, tokens: Sequence[int]) -> None:
        """Note what was emitted."""
        self._tokens += tokens

    def reset(self) -> None:
        """Forget the text. Raises `UserError` while a stream is open in it."""
        if self.busy:
            raise UserError("expected an idle conversation, got one with an open stream; finish or close that first")
        self._tokens = []
        self.target.truncate(0)
        for draft in self._drafts():
            draft.truncate(0)

    def _drafts(self) -> list[RewindableDraft]:
        """Those that hold the text; one that failed is not asked again."""
        failed = self.guard.failure is not None
        return [draft for draft in (None if failed else self._sequence, self._lookup) if draft is not None]

    def close(self) -> None:
        """Give the target's blocks back. Raises `UserError` while a stream is open in it."""
        self.reset()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
