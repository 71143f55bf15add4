"""A draft model's side of one text: its cache of verified pairs, and the tree that it grows on top of them.

The draft reads pairs (EAGLE, Li et al. 2024, arXiv 2401.15077, section 4.1): the target's feature of position t goes
with the token of position t + 1. Inside a drafted branch the target's features do not exist yet, and the draft's own
predictions stand in. A draft that is a language model reads tokens alone: its pairs have no feature, and the text's
first token makes one, too.

Letters: n new tokens, W rows expanded at a level, D hidden size.
"""

from __future__ import annotations

import functools

import numpy as np

from dovetail.runtime.drafts.base import Foresight, blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall, DraftGraph, DraftMemory
from dovetail.runtime.policies.base import Growth
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, TreeBuilder, root_only

PREFILL_CHUNK = 256
READ_AT_ONCE = 128  # verified pairs: of a longer prompt the draft reads the end alone


class ModelDraft:
    """The draft's side of one text: its cache of verified pairs, and the tree it grows on top of them."""

    def __init__(self, model: DraftGraph, memory: DraftMemory) -> None:
        self._model = model
        self._memory = memory
        self._forgotten = 0  # verified pairs before those in the cache
        self.length = 0  # verified pairs in the cache
        self._unread: list[tuple[Int64s, Float32s]] = []  # verified pairs still to be read

    @property
    def native_s(self) -> float:
        """Seconds spent inside the engine so far, over all sequences of the model."""
        return self._model.native_s

    @property
    def bytes_in(self) -> int:
        """See `Draft`."""
        return self._memory.bytes_in

    @property
    def bytes_out(self) -> int:
        """See `Draft`."""
        return self._memory.bytes_out

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        """See `Draft.propose`. One call of the graph per level; the first also reads the newly verified pairs.

        Where no tree is wanted, nothing is run: the pairs wait for the next call.
        """
        root = int(tokens[-1])
        if not self._model.info.reads_features:
            features = np.zeros((len(tokens), 0), np.float32)
        self._unread.append((tokens[len(tokens) - len(features) :], features))
        if not growth.goes_on(0, [0.0]):
            return root_only(root)
        width = min(growth.width, self._model.info.top_k)
        count = width if foresight is blind else self._model.info.top_k  # what is foreseen may favour any of them
        children = self._read(count)
        if children is None:  # the text's first token: nothing to go by
            return root_only(root)
        builder = TreeBuilder(root)
        builder.extend([0], *children.best(width, 1, foresight))
        visible = [b""]  # of the last call's rows: which tree rows in the cache they see
        level = 1
        while growth.goes_on(level, builder.newest_scores):
            chosen = builder.frontier(width)  # [W]
            parents = [(candidate - builder.newest) // width for candidate in chosen]  # rows of the last call
            size, drafted = len(chosen), len(visible[0])
            visible = [visible[parent] + itself for parent, itself in zip(parents, _unit_rows(size), strict=True)]
            children = self._memory.run(
                DraftCall(
                    tokens=builder.tokens_of(chosen),
                    features=None,
                    feature_rows=parents,
                    positions=[self.length + level - 1] * size,
                    visible=visible,
                    first_row=self.length + drafted,
                    wanted=size,
                    children=count,
                )
            )
            level += 1
            builder.extend(chosen, *children.best(width, level, foresight))
        return builder.best(growth.drafted)

    @property
    def known(self) -> int:
        """Verified pairs it was given: in the cache, before it, or waiting to be read."""
        return self._forgotten + self.length + sum(len(features) for _, features in self._unread)

    def truncate(self, known: int) -> None:
        """Forget the pairs from `known` on."""
        assert 0 <= known <= self.known
        waiting, self._unread = self._unread, []
        room = known - self._forgotten - self.length
        for tokens, features in waiting:
            self._unread.append((tokens[: max(room, 0)], features[: max(room, 0)]))
            room -= len(features)
        self._forgotten = min(self._forgotten, known)
        self.length = min(self.length, known - self._forgotten)

    def _read(self, count: int) -> Children | None:
        """Take the verified pairs into the cache; returns `count` children of the last row.

        What lies far back says little about the next few tokens, and reading it would keep the first token waiting:
        where many pairs have come at once, a cache of the last ones replaces the old. Rotary positions are relative.
        A language model that reads no features knows of the text before only what it reads itself: it reads all.
        """
        tokens, features = self._unread[0]
        if len(self._unread) > 1:
            tokens, features = (np.concatenate(parts) for parts in zip(*self._unread, strict=True))
        self._unread.clear()
        excess = len(tokens) - READ_AT_ONCE
        if excess > 0 and self._model.info.reads_features:
            self._forgotten, self.length = self._forgotten + self.length + excess, 0
            tokens, features = tokens[excess:], features[excess:]
        children = None
        for begin in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[begin : begin + PREFILL_CHUNK].tolist()
            size = len(chunk)
            children = self._memory.run(
                DraftCall(
                    tokens=chunk,
                    features=features[begin : begin + size] if self._model.info.reads_features else None,
                    feature_rows=range(size),
                    positions=range(self.length, self.length + size),
                    visible=[b"\1" * (row + 1) + b"\0" * (size - row - 1) for row in range(size)],
                    first_row=self.length,
                    wanted=1,
                    children=count,
                )
            )
            self.length += size
        return children


@functools.cache
def _unit_rows(size: int) -> list[bytes]:
    """Row i has a 1 at i, and no other."""
    return [bytes(row == column for column in range(size)) for row in range(size)]
