"""Two drafts in one: where the text repeats itself, its own continuation costs nothing and reaches further than a model
looks ahead; elsewhere the model is asked (as in SAM Decoding, Hu et al. 2024, arXiv 2411.10666).

Which of them a round gets is the policy's to say (`dovetail.runtime.policies.lookup_or_model`). What the model missed
meanwhile waits until it is asked again.
"""

from __future__ import annotations

from dovetail.runtime.drafts.base import Draft, Foresight, blind
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.policies.base import NO_GROWTH, Growth
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree


class MixedDraft:
    """A draft model, and matches in the text where `Growth.matches` finds them better. See `Draft`."""

    def __init__(self, model: Draft, lookup: LookupDraft) -> None:
        self._model, self._lookup = model, lookup

    @property
    def native_s(self) -> float:
        """The model's: a lookup has no engine."""
        return self._model.native_s

    @property
    def bytes_in(self) -> int:
        """The model's."""
        return self._model.bytes_in

    @property
    def bytes_out(self) -> int:
        """The model's."""
        return self._model.bytes_out

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        """See `Draft.propose`. Both are told of the tokens, whichever draws the tree."""
        matches = growth.matches or NO_GROWTH
        found = self._lookup.propose(tokens, features, matches, foresight)
        if len(found) == 1:
            return self._model.propose(tokens, features, growth, foresight)
        self._model.propose(tokens, features, NO_GROWTH, foresight)
        return found
