"""A draft that may fail: whatever it does, the text goes on, and the tokens are the same."""

from __future__ import annotations

import logging
from collections import deque

from dovetail.runtime.drafts.base import Draft, Foresight, blind
from dovetail.runtime.policies.base import NO_GROWTH, Growth
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, root_only

_log = logging.getLogger(__name__)

WINDOW = 64  # rounds that are judged together
FLOOR = 0.05  # of these, the share in which the target must have agreed with a first drafted token
REST = 256  # rounds without the draft before it is tried again; doubled every time


class GuardedDraft:
    """Stands before a draft. One that raises or answers NaN is given up; one that hardly ever agrees gets a rest.

    Every drafted round costs at least one call of the draft, so below `FLOOR` it cannot earn what it costs unless it is
    twenty times cheaper than a pass of the target.
    """

    def __init__(self, draft: Draft) -> None:
        """Why the draft was given up, or first put to rest, is logged once."""
        self._draft = draft
        self._agreed: deque[bool] = deque(maxlen=WINDOW)
        self._rest = 0  # rounds left to go without the draft
        self._next_rest = REST
        self._drafted = False  # whether the last tree had a drafted node
        self.failure: str | None = None  # why the draft was given up
        self.rests = 0

    @property
    def native_s(self) -> float:
        """See `Draft`."""
        return self._draft.native_s

    @property
    def bytes_in(self) -> int:
        """See `Draft`."""
        return self._draft.bytes_in

    @property
    def bytes_out(self) -> int:
        """See `Draft`."""
        return self._draft.bytes_out

    def begin(self) -> None:
        """Another text begins: how many tokens come next says nothing of the last tree."""
        self._drafted = False

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        """The draft's tree, or the root alone while there is no draft to ask."""
        if self._drafted:
            self._agreed.append(len(tokens) > 1)
        self._drafted = False
        if self.failure is not None:
            return root_only(int(tokens[-1]))
        try:
            tree = self._draft.propose(tokens, features, NO_GROWTH if self._resting() else growth, foresight)
        except Exception as error:  # the draft is only a guess: nothing it does may end the text
            self.failure = f"{type(error).__name__}: {error}"
            _log.warning(f"the draft failed ({self.failure:.200}); the text goes on, the same without it")
            return root_only(int(tokens[-1]))
        self._drafted = len(tree) > 1
        return tree

    def _resting(self) -> bool:
        if self._rest:
            self._rest -= 1
            return True
        if len(self._agreed) == WINDOW and sum(self._agreed) < FLOOR * WINDOW:
            share = sum(self._agreed) / WINDOW
            if not self.rests:
                _log.warning(
                    f"the target agrees with the draft in {share:.0%} of rounds, so the draft rests for "
                    f"{self._next_rest} rounds. Was it trained for this target?"
                )
            self._rest, self._next_rest = self._next_rest - 1, 2 * self._next_rest
            self.rests += 1
            self._agreed.clear()
            return True
        return False
