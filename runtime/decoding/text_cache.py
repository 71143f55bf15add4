"""What the two models remember of one text: a place in the target's cache, and the drafts that were told of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dovetail.runtime.drafts.base import Draft
from dovetail.runtime.drafts.guard import GuardedDraft
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.targets.base import TargetSequence
from dovetail.runtime.trees.tree import Float32s, Int64s
from dovetail.runtime.trees.verified import Verified


class TextCache:
    """Of one text at a time; a further turn of a conversation goes on with what it shares."""

    def __init__(self, target: TargetSequence, model: Draft | None, lookup: LookupDraft | None) -> None:
        self.target = target
        self.model = None if model is None else GuardedDraft(model)
        self.lookup = None if lookup is None else GuardedDraft(lookup)

    def roll_back(self, length: int) -> int:
        """Keep the first `length` tokens of the text that it holds, as far as it holds them; returns how many."""
        kept = min(length, self.target.length)
        if self.model is not None and self.model.failure is None:
            kept = min(kept, self.model.known)
        self.truncate(kept)
        return kept

    def truncate(self, length: int) -> None:
        """Forget the text from position `length` on."""
        self.target.truncate(min(length, self.target.length))
        for draft in (self.model, self.lookup):
            if draft is not None:
                draft.truncate(min(length, draft.known))

    def tell(self, text: Sequence[int], begin: int, features: Float32s) -> None:
        """The target verified `text` up to its last token; `features` [m, D] are of the positions from `begin` on."""
        if self.model is not None and self.model.failure is None:
            self.model.tell(Verified(begin, _tokens(text, begin), features))
        if self.lookup is not None:
            known = self.lookup.known
            tokens = _tokens(text, known)
            if len(tokens):  # none while a text that was preempted is read again
                self.lookup.tell(Verified(known, tokens, np.empty((len(tokens) - 1, 0), np.float32)))

    def close(self) -> None:
        """Give all memory back."""
        self.target.close()
        for draft in (self.model, self.lookup):
            if draft is not None:
                draft.close()


def shared_length(tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """How many of the text `tokens` a new `prompt` can go on from: one less than they share, because the newest pair
    has the feature of a shared token together with the one behind it.
    """
    pairs = zip(tokens, prompt[:-1], strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(shared - 1, 0)


def _tokens(text: Sequence[int], begin: int) -> Int64s:
    return np.array(text[begin:], np.int64)
