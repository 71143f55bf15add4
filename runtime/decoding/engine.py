"""The engine: one pass over the weights for all texts at a time. It owns the round; one text is an engine with one.

admit    free the cancelled, let in the waiting while there is room
share    prompt tokens and roots of this pass
draft    trees for the texts that decode, their calls shared; the best nodes of all
forward  one pass over the weights
take     every text draws, commits, and tells its drafts
"""

from __future__ import annotations

import dataclasses
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from dovetail.runtime.decoding.drafting import draft_trees
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.decoding.sequence import Sequence
from dovetail.runtime.drafts.graph_contract import DraftGraph
from dovetail.runtime.drafts.joint_calls import CallTime, JointCalls
from dovetail.runtime.errors import CacheFullError, PassAbandonedError, UserError
from dovetail.runtime.targets.base import Step, StepOutput, TargetEngine
from dovetail.runtime.trees.shape import MAX_TREE_NODES


@dataclasses.dataclass(frozen=True, slots=True)
class PassCost:
    """What one pass was and cost, in milliseconds. `host_ms` is all that is in neither model's engine."""

    texts: int
    rows: int
    draft_ms: float
    verify_ms: float
    host_ms: float
    bytes_to_draft: int
    bytes_from_draft: int
    draft_calls: tuple[CallTime, ...]

    @property
    def total_ms(self) -> float:
        """All of it."""
        return self.draft_ms + self.verify_ms + self.host_ms


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """What a step brought one text."""

    sequence: Sequence
    tokens: list[int]  # accepted drafted tokens, then the bonus token; none while a prompt is read
    nodes: int  # of the verified tree; 0: a chunk was read
    cost: PassCost | None  # None: it took no part in a pass, but ended

    @property
    def accept_length(self) -> int:
        """Accepted drafted tokens, the bonus token not counted."""
        return max(len(self.tokens) - 1, 0) if self.nodes else 0


class IdleCache(Protocol):
    """Pages that nobody needs now, and that can be had back by reading again."""

    def evict(self) -> bool:
        """Give them up; whether there were any."""
        ...


class Engine:
    """Texts that wait, texts that run, and the step that moves all of them on. Not thread-safe by itself: hold `lock`
    while calling anything.
    """

    def __init__(self, target: TargetEngine, planner: RoundPlanner, graph: DraftGraph | None, max_texts: int) -> None:
        """`max_texts` run at a time; the others wait, first come, first served."""
        self.lock = threading.RLock()
        self.target = target
        self._planner, self._graph, self._max_texts = planner, graph, max_texts
        self._calls = None if graph is None else JointCalls(graph)
        self._is_stepping = self._is_closed = False
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._passing: list[Sequence] = []  # in the pass that runs now
        self._idle: list[IdleCache] = []  # the least recently used first
        self._undelivered: deque[Update] = deque()
        self._listeners: dict[int, weakref.WeakMethod[Callable[[Update], None]]] = {}
        self._on_end: dict[int, Callable[[], None]] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    def add(self, sequence: Sequence, listener: Callable[[Update], None], on_end: Callable[[], None]) -> None:
        """A text that waits for its first step. The method `listener` is called with every update; when its object is
        dropped, the text is cancelled. `on_end` is called once when the text has ended in any way.
        """
        self._waiting.append(sequence)
        self._listeners[id(sequence)] = weakref.WeakMethod(listener)
        self._on_end[id(sequence)] = on_end

    def keep_idle(self, cache: IdleCache) -> None:
        """A conversation between two turns: its pages stay as long as nobody else needs them."""
        self._idle.append(cache)

    def take_idle(self, cache: IdleCache) -> None:
        """It is used again, or closed."""
        self._idle = [other for other in self._idle if other is not cache]

    def step(self) -> list[Update]:
        """Move all running texts on by one pass. Whatever goes wrong with one of them ends that one alone; a target
        that fails ends all. An interrupt leaves every text as it was before the step.
        """
        ended = self._admit()
        running = list(self._running)
        for sequence in running:
            sequence.mark()
        self._is_stepping = True
        try:
            updates = self._round(running)
        except PassAbandonedError:  # the cancelled end with the next step; who joined meanwhile makes it anew
            for sequence in running:
                sequence.rewind()
            updates = []
        except Exception as error:
            for sequence in running:
                sequence.rewind()
                sequence.end("error", error)
            updates = [Update(sequence, [], 0, None) for sequence in running]
        except BaseException:
            for sequence in running:
                sequence.rewind()
            raise
        finally:
            self._is_stepping = False
        self._deliver(updates)
        self._retire()
        return ended + updates

    def cancel(self, sequence: Sequence) -> None:
        """Ask for the end of `sequence`, from any thread and without the lock. A pass that runs and that nobody waits
        for any more is ended, too.
        """
        sequence.is_cancelled = True
        passing = self._passing
        if passing and all(one.is_cancelled for one in passing):
            self.target.abandon()

    def sweep(self) -> list[Update]:
        """End the cancelled now, not only with the next step. In the middle of one it does nothing."""
        updates: list[Update] = []
        if self._is_stepping:
            return updates
        for sequence in [*self._waiting, *self._running]:
            if sequence.is_cancelled and sequence.finish_reason is None:
                sequence.end("cancelled")
                updates.append(Update(sequence, [], 0, None))
        self._deliver(updates)
        self._retire()
        return updates

    def check_open(self) -> None:
        """Raise `UserError` if it is closed: nothing may be added any more."""
        if self._is_closed:
            raise UserError("expected an open pipeline, got a closed one; load the artifact again")

    def close(self) -> None:
        """End all texts as cancelled, and take no more."""
        self._is_closed = True
        for sequence in [*self._waiting, *self._running]:
            sequence.is_cancelled = True
        self.sweep()

    # The parts of a step.

    def _admit(self) -> list[Update]:
        """Free the cancelled and let in the waiting while there is room for what they have to read."""
        updates = self.sweep()
        siblings = {id(sibling) for sequence in [*self._running, *self._waiting] for sibling in sequence.siblings}
        for sequence in list(self._waiting):
            if len(self._running) >= self._max_texts:
                break
            if id(sequence) in siblings:  # its prompt is being read by another
                continue
            # A text that runs alone always fits; beside others it must not push them out at once.
            if self._running and not self._has_room(sequence.unread + MAX_TREE_NODES):
                break
            self._waiting.remove(sequence)
            self._running.append(sequence)
        return updates

    def _has_room(self, tokens: int) -> bool:
        while self.target.free < tokens:
            if not self._evict():
                return False
        return True

    def _evict(self) -> bool:
        """Give up the pages of the conversation that was idle longest, or of the last text that waits with some;
        whether there was one.
        """
        while self._idle:
            if self._idle.pop(0).evict():
                return True
        for sequence in reversed(self._waiting):
            if sequence.context:
                sequence.preempt()
                return True
        return False

    def _round(self, running: list[Sequence]) -> list[Update]:
        start = time.perf_counter()
        texts = self._reserved(running)
        if not texts:
            return []
        readers = [(sequence, count) for sequence, count in texts if not sequence.is_decoding]
        decoders = [sequence for sequence, _ in texts if sequence.is_decoding]
        before = self._draft_counters()
        steps: list[tuple[Sequence, Step]] = []
        times: list[CallTime] = []
        rows = prompt_tokens = sum(count for _, count in readers)
        if decoders:
            paces = [sequence.pace for sequence in decoders]
            load = self._planner.load(paces, [sequence.context for sequence in decoders], prompt_tokens)
            trees, times = draft_trees(self._planner, load, decoders, self._calls)
            steps += [(sequence, sequence.plan_tree(tree)) for sequence, tree in zip(decoders, trees, strict=True)]
            rows += self._planner.size
        else:
            self._planner.forget_size()
        steps += [(sequence, sequence.plan_chunk(count)) for sequence, count in readers]
        drafted = self._draft_counters()
        verify_start = time.perf_counter()
        self._passing = [sequence for sequence, _ in steps]
        try:
            outputs = self.target.forward([step for _, step in steps], rows)
        finally:
            self._passing = []
        verify_ms = 1e3 * (time.perf_counter() - verify_start)
        taken = [(sequence, self._take(sequence, out)) for (sequence, _), out in zip(steps, outputs, strict=True)]
        draft_s, bytes_in, bytes_out = (now - then for now, then in zip(drafted, before, strict=True))
        total_ms = 1e3 * (time.perf_counter() - start)
        cost = PassCost(
            texts=len(steps),
            rows=sum(len(step.tree) for _, step in steps),
            draft_ms=1e3 * draft_s,
            verify_ms=verify_ms,
            host_ms=total_ms - verify_ms - 1e3 * draft_s,
            bytes_to_draft=int(bytes_in),
            bytes_from_draft=int(bytes_out),
            draft_calls=tuple(times),
        )
        return [
            Update(sequence, tokens, 0 if sequence.is_reading else len(sequence.tree), cost)
            for sequence, tokens in taken
        ]

    def _reserved(self, running: list[Sequence]) -> list[tuple[Sequence, int]]:
        """The texts that take part in this pass, each with how many tokens it reads, if any, and with room for them.

        Where the cache is full, the text that was let in last waits again: it gives its pages up, reads them anew
        later, and goes on with the same tokens.
        """
        texts = []
        shares = self._planner.prompt_tokens([0 if one.is_decoding else one.readable for one in running])
        for sequence, count in zip(running, shares, strict=True):
            if sequence not in self._running or not (count or sequence.is_decoding):
                continue
            rows = 1 + min(sequence.pace.policy.most_nodes, MAX_TREE_NODES) if sequence.is_decoding else max(count, 2)
            while True:
                try:
                    sequence.cache.target.reserve(rows)
                    texts.append((sequence, count))
                    break
                except CacheFullError:
                    if self._evict():
                        continue
                    last = self._running[-1]
                    self._preempt(last)
                    texts = [text for text in texts if text[0] is not last]
                    if last is sequence:
                        break
        return texts

    def _preempt(self, sequence: Sequence) -> None:
        assert len(self._running) > 1, "one text alone has the whole cache"
        sequence.preempt()
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)

    def _take(self, sequence: Sequence, out: StepOutput) -> list[int]:
        try:
            return sequence.take(out)
        except Exception as error:
            sequence.rewind()
            sequence.end("error", error)
            return []

    def _deliver(self, updates: Iterable[Update]) -> None:
        """Tell the listeners; one of them may end its text. What an interrupt leaves is told the next time."""
        self._undelivered += updates
        while self._undelivered:
            update = self._undelivered.popleft()
            listener = self._listeners[id(update.sequence)]()
            if listener is None:
                update.sequence.end("cancelled")
            else:
                listener(update)

    def _retire(self) -> None:
        """Let go of the texts that have ended."""
        ended = [sequence for sequence in (*self._running, *self._waiting) if sequence.finish_reason is not None]
        self._running = [sequence for sequence in self._running if sequence.finish_reason is None]
        self._waiting = deque(sequence for sequence in self._waiting if sequence.finish_reason is None)
        for sequence in ended:
            sequence.siblings = []
            del self._listeners[id(sequence)]
            self._on_end.pop(id(sequence))()

    def _draft_counters(self) -> tuple[float, int, int]:
        graph = self._graph
        return (0.0, 0, 0) if graph is None else (graph.native_s, graph.bytes_in, graph.bytes_out)
