"""Growing the trees of several texts level by level, in calls that they share."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence

from dovetail.runtime.drafts.base import TreeGrowth
from dovetail.runtime.drafts.graph_contract import Children, DraftCall, DraftGraph
from dovetail.runtime.errors import DraftError

MAX_ROWS = 32  # of a call that texts share: beyond, every row costs as much as in a call of its own

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class CallTime:
    """How long a call of the graph took."""

    rows: int  # pairs, over all its texts
    reads_text: bool
    ms: float


class JointCalls:
    """Runs a graph for the trees of all texts of a round."""

    def __init__(self, graph: DraftGraph) -> None:
        self.graph = graph
        self._share = True

    def grow(self, growths: Sequence[TreeGrowth], width: int) -> list[CallTime]:
        """Let all trees grow to their end; `width` is that of the widest level of any. Returns the calls' times.

        Predicted features are where the last call left them, so a group of texts goes through all its levels before
        the next group begins.
        """
        times: list[CallTime] = []
        size = max(MAX_ROWS // max(width, 1), 1) if self._share else 1
        for begin in range(0, len(growths), size):
            group = growths[begin : begin + size]
            try:
                if len(group) == 1:
                    self._grow_alone(group[0], times)
                else:
                    self._grow_together(group, times)
            except BaseException as error:  # what the last call has written is not known
                for growth in group:
                    growth.abandon()
                if len(group) == 1 or not isinstance(error, Exception):
                    raise
                # Whose fault it is shows when each text calls alone, from now on.
                _log.warning("a call that %d drafts shared failed (%s); they call alone from now on", len(group), error)
                self._share = False
        return times

    def _grow_alone(self, growth: TreeGrowth, times: list[CallTime]) -> None:
        while (call := growth.next_call()) is not None:
            self._answer(growth, call, times)

    def _grow_together(self, group: Sequence[TreeGrowth], times: list[CallTime]) -> None:
        calls: list[DraftCall | None] = []
        for growth in group:
            # Many verified pairs are read alone, all but the last: the call that gives children is short, and shared.
            while (call := growth.next_call(alone=False)) is not None and not call.is_last:
                self._answer(growth, call, times)
            calls.append(call)
        while any(call is not None for call in calls):
            asking = [(growth, call) for growth, call in zip(group, calls, strict=True) if call is not None]
            answers = self._run([call for _, call in asking], times)
            if len(asking) > 1 and not math.isfinite(sum(float(children.log_probs.sum()) for children in answers)):
                raise DraftError("log-probabilities that are not numbers")  # a mask does not keep them from the others
            for (growth, _), children in zip(asking, answers, strict=True):
                growth.take(children)
            calls = [
                None if call is None else growth.next_call(alone=False)
                for growth, call in zip(group, calls, strict=True)
            ]

    def _answer(self, growth: TreeGrowth, call: DraftCall, times: list[CallTime]) -> None:
        try:
            children = self._run([call], times)[0]
        except Exception as error:  # the draft is only a guess: nothing it does may end the text
            growth.fail(error)
        else:
            growth.take(children)

    def _run(self, calls: Sequence[DraftCall], times: list[CallTime]) -> list[Children]:
        start = time.perf_counter()
        answers = self.graph.run(calls)
        rows = sum(len(call.tokens) for call in calls)
        times.append(CallTime(rows, calls[0].reads_text, 1e3 * (time.perf_counter() - start)))
        return answers
