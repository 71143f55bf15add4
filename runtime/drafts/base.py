"""What a draft is: it proposes a token tree, from what it has read of the text and what it guesses itself.

Letters: n new tokens, R rows of candidates, K candidates in a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dovetail.runtime.policies.base import Growth
from dovetail.runtime.trees.tree import Float32s, Int64s, Integers, Tree, root_only

Foresight = Callable[[int, Integers, Float32s], Float32s]
"""(depth from 1, tokens [R, K], their log-probabilities [R, K] in the draft) -> [R, K]: these, given what is known of
the random draw so many positions ahead. See `Sampler.foresee`."""


def blind(depth: int, tokens: Integers, log_probs: Float32s) -> Float32s:
    """Nothing is known."""
    return log_probs


class Draft(Protocol):
    """Guesses the target's next tokens for one text."""

    @property
    def native_s(self) -> float: ...  # seconds spent inside the draft's engine so far
    @property
    def bytes_in(self) -> int: ...  # handed to the draft's device for this text so far
    @property
    def bytes_out(self) -> int: ...  # taken from it

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        """A tree rooted at `tokens[-1]`.

        `tokens` [n] are new since the last call. `features` [m, D] are the target's for the tokens one position
        before; m == n, except on the first call of a text, where m == n - 1: the first token follows nothing.
        `foresight`: which candidates the target's draws will favour.
        """
        ...


class RewindableDraft(Draft, Protocol):
    """A draft that a later turn of the same text can roll back."""

    @property
    def known(self) -> int: ...  # positions of the text that it was told of
    def truncate(self, known: int) -> None: ...  # forget those from `known` on


class NoDraft:
    """Plain decoding: the tree is its root."""

    native_s = 0.0
    bytes_in = bytes_out = 0

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        """The last token alone."""
        return root_only(int(tokens[-1]))
