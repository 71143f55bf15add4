"""A draft that may fail: whatever it does, the text goes on, and the tokens are the same."""

from __future__ import annotations

import logging

from dovetail.runtime.drafts.base import Draft, Foresight, Grown, TreeGrowth, blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.policies.base import TreeBudget
from dovetail.runtime.trees.tree import CandidateTree
from dovetail.runtime.trees.verified import Verified

_log = logging.getLogger(__name__)


class GuardedDraft:
    """Stands before a draft, and gives one up that raises or answers what is no number. See `Draft`."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self.failure: str | None = None  # why the draft was given up

    @property
    def known(self) -> int:
        """See `Draft`."""
        return self._draft.known

    def tell(self, verified: Verified) -> None:
        """See `Draft`."""
        if self.failure is None:
            try:
                self._draft.tell(verified)
            except Exception as error:
                self.give_up(error)

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> TreeGrowth:
        """See `Draft`. The root alone where there is no draft to ask any more."""
        if self.failure is None:
            try:
                return GuardedGrowth(self, self._draft.grow(root, budget, foresight), root)
            except Exception as error:
                self.give_up(error)
        return Grown(CandidateTree(root))

    def truncate(self, known: int) -> None:
        """See `Draft`."""
        if self.failure is None:
            try:
                self._draft.truncate(known)
            except Exception as error:
                self.give_up(error)

    def close(self) -> None:
        """See `Draft`."""
        try:
            self._draft.close()
        except Exception as error:
            if self.failure is None:
                self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Ask the draft no more."""
        self.failure = f"{type(error).__name__}: {error}"
        _log.warning("the draft failed (%.200s); the text goes on, the same without it", self.failure)


class GuardedGrowth:
    """Stands before one round's tree. See `TreeGrowth`."""

    def __init__(self, guard: GuardedDraft, growth: TreeGrowth, root: int) -> None:
        self._guard, self._growth, self._root = guard, growth, root

    @property
    def candidates(self) -> CandidateTree:
        """See `TreeGrowth`. Of a draft that failed nothing is taken."""
        return self._growth.candidates if self._guard.failure is None else CandidateTree(self._root)

    def next_call(self, alone: bool = True) -> DraftCall | None:
        """See `TreeGrowth`."""
        if self._guard.failure is None:
            try:
                return self._growth.next_call(alone)
            except Exception as error:
                self.fail(error)
        return None

    def take(self, children: Children) -> None:
        """See `TreeGrowth`."""
        try:
            self._growth.take(children)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """See `TreeGrowth`. The draft is given up."""
        self._guard.give_up(error)
        self.abandon()

    def abandon(self) -> None:
        """See `TreeGrowth`."""
        try:
            self._growth.abandon()
        except Exception as error:
            if self._guard.failure is None:
                self._guard.give_up(error)
