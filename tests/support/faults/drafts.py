"""A draft in which something goes wrong: where and what says a subclass."""

from __future__ import annotations

from dovetail.runtime.drafts.base import Draft, Foresight, TreeGrowth, blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.policies.base import TreeBudget
from dovetail.runtime.trees.tree import CandidateTree
from dovetail.runtime.trees.verified import Verified


class FaultyDraft:
    """See `Draft`."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def before(self, name: str) -> None:
        """Called before the draft's `tell`, `grow` and `truncate`, and its trees' `next_call` and `take`."""

    def grown(self, root: int, growth: TreeGrowth) -> TreeGrowth:
        """What grows instead of `growth`."""
        return growth

    def answered(self, children: Children) -> Children:
        """What a tree takes instead of `children`."""
        return children

    @property
    def known(self) -> int:
        """See `Draft`."""
        return self._draft.known

    def tell(self, verified: Verified) -> None:
        """See `Draft`."""
        self.before("tell")
        self._draft.tell(verified)

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> TreeGrowth:
        """See `Draft`."""
        self.before("grow")
        return self.grown(root, FaultyGrowth(self, self._draft.grow(root, budget, foresight)))

    def truncate(self, known: int) -> None:
        """See `Draft`."""
        self.before("truncate")
        self._draft.truncate(known)

    def close(self) -> None:
        """See `Draft`."""
        self._draft.close()


class FaultyGrowth:
    """See `TreeGrowth`."""

    def __init__(self, draft: FaultyDraft, growth: TreeGrowth) -> None:
        self._draft, self._growth = draft, growth

    @property
    def candidates(self) -> CandidateTree:
        """See `TreeGrowth`."""
        return self._growth.candidates

    def next_call(self, alone: bool = True) -> DraftCall | None:
        """See `TreeGrowth`."""
        self._draft.before("next_call")
        return self._growth.next_call(alone)

    def take(self, children: Children) -> None:
        """See `TreeGrowth`."""
        self._draft.before("take")
        self._growth.take(self._draft.answered(children))

    def fail(self, error: Exception) -> None:
        """See `TreeGrowth`."""
        self._growth.fail(error)

    def abandon(self) -> None:
        """See `TreeGrowth`."""
        self._growth.abandon()
