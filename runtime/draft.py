"""The draft: proposes a token tree, from what it has read of the text and what it guesses itself.

Letters: n new tokens, T pairs in a call, F feature rows, M cache rows under the mask, R rows wanted, K children per
row, W rows expanded at a level, D hidden size.

The draft reads pairs (EAGLE, Li et al. 2024, arXiv 2401.15077, section 4.1): the target's feature of position t goes
with the token of position t + 1. Inside a drafted branch the target's features do not exist yet, and the draft's own
predictions stand in. A draft that is a language model reads tokens alone: its pairs have no feature, and the text's
first token makes one, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
from dovetail.runtime.errors import DraftError
from dovetail.runtime.manifest import DraftInfo
from dovetail.runtime.policy import Growth
from dovetail.runtime.tree import Bools, Float32s, Int64s, Integers, Tree, TreeBuilder, root_only

PREFILL_CHUNK = 256
READ_AT_ONCE = 256  # verified pairs: of a longer prompt the draft reads the end alone


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


class SequenceDraft(Draft, Protocol):
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


@dataclasses.dataclass(frozen=True, slots=True)
class DraftCall:
    """One call of the graph. `cache_rows` in use end with the last of this call's."""

    tokens: Int64s  # [T]
    features: npt.NDArray[np.float16] | None  # [F, D] the target's; None: what the last call predicted, if it reads any
    feature_rows: Int64s  # [T] which of them each pair reads
    positions: Int64s  # [T]
    tree_mask: Bools  # [T, M] which of the last M cache rows a pair sees; it sees all before them
    cache_rows: Int64s  # [T] where keys and values go: the last T of the rows in use
    logit_rows: Int64s  # [R]


@dataclasses.dataclass(frozen=True, slots=True)
class Children:
    """The best next tokens of the R rows wanted."""

    tokens: npt.NDArray[np.int32]  # [R, K]
    log_probs: Float32s  # [R, K] descending

    def best(self, width: int, depth: int, foresight: Foresight) -> tuple[Integers, Float32s]:
        """The `width` best tokens of every row, `depth` levels below the root, and their log-probabilities."""
        log_probs = foresight(depth, self.tokens, self.log_probs)
        if log_probs is self.log_probs:
            return self.tokens[:, :width], log_probs[:, :width]
        order = np.argsort(-log_probs, axis=1, kind="stable")[:, :width]
        return np.take_along_axis(self.tokens, order, axis=1), np.take_along_axis(log_probs, order, axis=1)


class DraftMemory(Protocol):
    """One text's keys, values and predicted features, on the device that computes with them."""

    bytes_in: int
    bytes_out: int

    def run(self, call: DraftCall) -> Children:
        """Call the graph. Predicted features stay where they are, for the next call."""
        ...


class DraftModel(Protocol):
    """A loaded draft graph. Texts share it; calls come from one thread at a time."""

    info: DraftInfo
    native_s: float
    device: str

    def sequence(self) -> DraftSequence:
        """A new text."""
        ...


class DraftSequence:
    """The draft's side of one text: its cache of verified pairs, and the tree it grows on top of them."""

    def __init__(self, model: DraftModel, memory: DraftMemory) -> None:
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
        children = self._read()
        if children is None:  # the text's first token: nothing to go by
            return root_only(root)
        width = min(growth.width, children.tokens.shape[1])
        builder = TreeBuilder(root)
        builder.extend([0], *children.best(width, 1, foresight))
        visible = np.zeros((1, 0), np.bool_)  # [rows of the last call, tree rows in the cache]
        level = 1
        while growth.goes_on(level, builder.newest_scores):
            chosen = builder.frontier(width)  # [W]
            source = np.array([(candidate - builder.newest) // width for candidate in chosen])  # their parents' rows
            size, drafted = len(chosen), visible.shape[1]
            visible = np.concatenate([visible[source], np.eye(size, dtype=np.bool_)], axis=1)  # each sees itself
            behind = self.length + drafted
            children = self._call(
                DraftCall(
                    tokens=builder.tokens_of(chosen),
                    features=None,
                    feature_rows=source,
                    positions=np.full(size, self.length + level - 1),
                    tree_mask=visible,
                    cache_rows=np.arange(behind, behind + size),
                    logit_rows=np.arange(size),
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

    def _read(self) -> Children | None:
        """Take the verified pairs into the cache; returns the last row's children.

        What lies far back says little about the next few tokens, and reading it would keep the first token waiting:
        where many pairs have come at once, a cache of the last ones replaces the old. Rotary positions are relative.
        A language model that reads no features knows of the text before only what it reads itself: it reads all.
        """
        tokens, features = (np.concatenate(parts) for parts in zip(*self._unread, strict=True))
        self._unread.clear()
        excess = len(tokens) - READ_AT_ONCE
        if excess > 0 and self._model.info.reads_features:
            self._forgotten, self.length = self._forgotten + self.length + excess, 0
            tokens, features = tokens[excess:], features[excess:]
        pairs, children = features.astype(np.float16), None
        for begin in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[begin : begin + PREFILL_CHUNK]
            size = len(chunk)
            rows = self.length + np.arange(size)
            children = self._call(
                DraftCall(
                    tokens=chunk,
                    features=pairs[begin : begin + size],
                    feature_rows=np.arange(size),
                    positions=rows,
                    tree_mask=np.tri(size, dtype=np.bool_),
                    cache_rows=rows,
                    logit_rows=np.array([size - 1]),
                )
            )
            self.length += size
        return children

    def _call(self, call: DraftCall) -> Children:
        children = self._memory.run(call)
        if not math.isfinite(children.log_probs.sum()):  # as is every sum with something that is none
            raise DraftError("the draft's log-probabilities are not numbers")
        return children
