"""What a draft is: told of what the target verified, it grows a tree of guesses behind the text's last token.

Letters: R rows of candidates, K candidates in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from dovetail.runtime.policies.base import TreeBudget
from dovetail.runtime.trees.tree import CandidateTree, Float32s, Integers
from dovetail.runtime.trees.verified import Verified

if TYPE_CHECKING:
    from dovetail.runtime.drafts.graph_contract import Children, DraftCall

Foresight = Callable[[Sequence[Sequence[int]], Integers, Float32s], Float32s]
"""(paths [R] of tokens behind the text, candidates [R, K] behind each path, their log-probabilities [R, K]) -> [R, K]:
these, given what is known of how the target will draw there. See `Sampler.foresee`."""


def blind(paths: Sequence[Sequence[int]], tokens: Integers, log_probs: Float32s) -> Float32s:
    """Nothing is known."""
    return log_probs


class TreeGrowth(Protocol):
    """A tree that grows a call of a graph at a time, so that several texts' trees can share their calls."""

    @property
    def candidates(self) -> CandidateTree:
        """What has grown so far."""
        ...

    def next_call(self, alone: bool = True) -> DraftCall | None:
        """What the graph is to compute next; None: the tree is grown. Not `alone`: the call is one of several, and
        short.
        """
        ...

    def take(self, children: Children) -> None:
        """The answer to the last call."""
        ...

    def fail(self, error: Exception) -> None:
        """The last call could not be computed."""
        ...

    def abandon(self) -> None:
        """A call that others shared went wrong: end here, and forget all that the graph holds of this text."""
        ...


class Draft(Protocol):
    """Guesses the target's next tokens for one text. It may fail in any way: see `GuardedDraft`."""

    @property
    def known(self) -> int:
        """Positions of the text whose pair it was told of: see `Verified`."""
        ...

    def tell(self, verified: Verified) -> None:
        """The text goes on so, or begins. What it knows already is told again without harm."""
        ...

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> TreeGrowth:
        """A tree behind `root`, the last token it was told of, as large as `budget` says; `foresight` tells which
        candidates the target's draws will favour.
        """
        ...

    def truncate(self, known: int) -> None:
        """Forget the pairs from position `known` on."""
        ...

    def close(self) -> None:
        """Give all memory back."""
        ...


class Grown:
    """A tree that needs no call of a graph."""

    def __init__(self, candidates: CandidateTree) -> None:
        self.candidates = candidates

    def next_call(self, alone: bool = True) -> None:
        """None is needed."""
        return

    def take(self, children: Children) -> None:
        """There was no call."""
        raise AssertionError("an answer without a call")

    def fail(self, error: Exception) -> None:
        """There was no call."""
        raise AssertionError("an error without a call")

    def abandon(self) -> None:
        """No graph holds anything."""
