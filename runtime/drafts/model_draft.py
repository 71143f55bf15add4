"""A draft model's side of one text: its rows of verified pairs, and the tree that it grows on top of them.

Inside a drafted branch the target's features do not exist yet, and the draft's own predictions stand in (EAGLE, Li et
al. 2024, arXiv 2401.15077, section 4.1). A draft that is a language model reads tokens alone: its pairs have no
feature, and the text's first token makes one, too.

Letters: W candidates expanded at a level, D hidden size.
"""

from __future__ import annotations

import itertools

import numpy as np

from dovetail.runtime.drafts.base import Foresight, blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall, DraftGraph
from dovetail.runtime.drafts.row_pool import RowTable
from dovetail.runtime.errors import CacheFullError, DraftError
from dovetail.runtime.policies.base import TreeBudget
from dovetail.runtime.trees.tree import CandidateTree, Float32s, Int64s
from dovetail.runtime.trees.verified import Verified

PREFILL_CHUNK = 256  # pairs a call
READ_AT_ONCE = 128  # verified pairs: of a longer prompt the draft reads the end alone
JOINT_PAIRS = 16  # that a text reads in a call with others


class ModelDraft:
    """See `Draft`. Texts of one graph share its pool of rows."""

    def __init__(self, graph: DraftGraph) -> None:
        self._graph = graph
        self._table = RowTable(graph.pool)
        self._forgotten = 0  # verified pairs before those in the cache
        self._length = 0  # verified pairs in the cache
        self._seen = bytearray()  # which rows of the pool hold them, 1 or 0
        self._tokens = np.empty(0, np.int64)  # [n] of pairs that are still to be read
        self._features = np.empty((0, graph.info.hidden_size if graph.info.reads_features else 0), np.float32)  # [n, D]
        self._newest: tuple[Int64s, Float32s] | None = None  # the last pair that was read

    @property
    def known(self) -> int:
        """See `Draft`."""
        return max(self._forgotten + self._length + len(self._tokens) - self._without_feature, 0)

    @property
    def _without_feature(self) -> int:
        """Pairs of the text's first token, which follows nothing."""
        return 0 if self._graph.info.reads_features else 1

    def tell(self, verified: Verified) -> None:
        """See `Draft`. Behind a gap it begins anew."""
        if verified.begin > self.known:
            self.truncate(0)
            self._forgotten = verified.begin + self._without_feature
        new = verified.since(self.known)
        tokens, features = new.following, new.features
        if self._without_feature:
            tokens = new.tokens if new.begin == 0 else tokens
            features = np.zeros((len(tokens), 0), np.float32)
        self._tokens = np.concatenate([self._tokens, tokens])
        self._features = np.concatenate([self._features, features])

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> ModelGrowth:
        """See `Draft`. One call of the graph per level; the first also reads the newly verified pairs."""
        return ModelGrowth(self, self._graph, root, budget, foresight)

    def truncate(self, known: int) -> None:
        """See `Draft`."""
        assert 0 <= known <= self.known
        pairs = known + self._without_feature if known else 0
        unread = max(pairs - self._forgotten - self._length, 0)
        self._tokens, self._features = self._tokens[:unread], self._features[:unread]
        self._forgotten = min(self._forgotten, pairs)
        self._shorten(min(self._length, pairs - self._forgotten))

    def close(self) -> None:
        """See `Draft`."""
        self.truncate(0)

    def _shorten(self, length: int) -> None:
        """Keep the first `length` verified rows, and no drafted ones."""
        if length < self._length:
            self._newest = None
        for row in self._table.rows(length, self._length):
            self._seen[row] = 0
        self._seen = self._seen.rstrip(b"\0")
        self._length = length
        self._table.release(length)

    # What a growth does with its text.

    @property
    def length(self) -> int:
        """Verified pairs in the cache."""
        return self._length

    @property
    def unread(self) -> int:
        """Verified pairs that are not in the cache yet."""
        return len(self._tokens)

    def prepare(self) -> None:
        """Have at least one pair to read, so that there is a row to grow from, and not more than is of use.

        What lies far back says little about the next few tokens, and reading it would keep the first token waiting:
        where many pairs have come at once, a cache of the last ones replaces the old. Rotary positions are relative.
        A language model that reads no features knows of the text before only what it reads itself: it reads all.
        """
        excess = len(self._tokens) - READ_AT_ONCE
        if excess > 0 and self._graph.info.reads_features:
            pairs = self._forgotten + self._length + excess
            self._shorten(0)
            self._forgotten = pairs
            self._tokens, self._features = self._tokens[excess:], self._features[excess:]
        if not len(self._tokens) and self._newest is not None:  # a growth was given up after it had read
            tokens, features = self._newest
            self._shorten(self._length - 1)
            self._tokens, self._features = tokens, features

    def read_call(self, count: int, children: int) -> DraftCall:
        """The call that reads the next `count` pairs. Raises `CacheFullError`, changing nothing."""
        begin, end = self._length, self._length + count
        self._table.reserve(end)
        rows = self._table.rows(begin, end)
        seen = self._seen
        seen += bytes(max(max(rows) + 1 - len(seen), 0))
        visible = []
        for row in rows:
            seen[row] = 1
            visible.append(bytes(seen))
        tokens, features = self._tokens[:count], self._features[:count]
        self._tokens, self._features = self._tokens[count:], self._features[count:]
        self._length = end
        self._newest = tokens[-1:], features[-1:]
        return DraftCall(
            tokens=tokens.tolist(),
            features=features if self._graph.info.reads_features else None,
            feature_rows=range(count),
            positions=range(begin, end),
            rows=rows,
            visible=visible,
            wanted=1,
            children=children,
            reads_text=True,
            is_last=not len(self._tokens),
        )

    def level_rows(self, drafted: int, count: int) -> list[int]:
        """Rows for `count` candidates behind the verified pairs and `drafted` others. Raises `CacheFullError`."""
        begin = self._length + drafted
        self._table.reserve(begin + count)
        return self._table.rows(begin, begin + count)

    def visible_rows(self) -> bytes:
        """Which rows of the pool hold the verified pairs."""
        return bytes(self._seen)

    def forget(self, drafted: int) -> None:
        """Drop all rows, those of `drafted` candidates too, and make them numbers again."""
        self._graph.clear(self._table.rows(0, self._length + drafted))
        pairs = self._forgotten + self._length + len(self._tokens)
        self._tokens, self._features = self._tokens[:0], self._features[:0]
        self._shorten(0)
        self._forgotten = pairs

    def end_growth(self) -> None:
        """Give back what only the tree needed."""
        self._table.release(self._length)


class ModelGrowth:
    """One round's tree of a `ModelDraft`. See `TreeGrowth`."""

    def __init__(
        self, draft: ModelDraft, graph: DraftGraph, root: int, budget: TreeBudget, foresight: Foresight
    ) -> None:
        self.candidates = CandidateTree(root)
        self._draft, self._budget, self._foresight = draft, budget, foresight
        self.width, self._vocab_size = min(budget.width, graph.info.top_k), graph.info.vocab_size
        # What is foreseen may favour any of the children.
        self._children = self.width if foresight is blind else graph.info.top_k
        self._reading = True
        self._done = not budget.wants_level([])
        self._expanded = [0]  # candidates whose children the last call computes
        self._first_row = 0  # of the last call's predicted features
        self._visible: list[bytes] = []  # [W] which rows of the pool each candidate of the last call sees
        self._drafted = 0  # rows that the tree has written
        if not self._done:
            draft.prepare()

    def next_call(self, alone: bool = True) -> DraftCall | None:
        """See `TreeGrowth`. Where the pool has no room the tree stays as it is."""
        if self._done:
            return None
        try:
            if self._reading:
                return self._read(alone)
            if self._budget.wants_level(self.candidates.levels):
                return self._level()
        except CacheFullError:
            pass
        self._done = True
        self._draft.end_growth()
        self._drafted = 0
        return None

    def _read(self, alone: bool) -> DraftCall | None:
        unread = self._draft.unread
        if not unread:  # the text's first token: nothing to go by
            self._done = True
            return None
        count = min(unread, PREFILL_CHUNK)
        if not alone and unread > JOINT_PAIRS:
            count = min(unread - 1, PREFILL_CHUNK)  # the last one is read together with others
        return self._draft.read_call(count, self._children)

    def _level(self) -> DraftCall:
        candidates = self.candidates
        chosen = candidates.frontier(self.width)  # [W]
        rows = self._draft.level_rows(self._drafted, len(chosen))
        if not self._visible:
            parents, visible = [0] * len(chosen), [self._draft.visible_rows()] * len(chosen)
        else:
            parents = [(candidate - candidates.newest) // self.width for candidate in chosen]
            visible = [self._visible[parent] for parent in parents]
        self._visible = [
            before.ljust(row, b"\0")[:row] + b"\1" + before[row + 1 :]
            for before, row in zip(visible, rows, strict=True)
        ]
        self._expanded = chosen
        self._drafted += len(chosen)
        position = self._draft.length + candidates.depth - 1
        return DraftCall(
            tokens=candidates.tokens_of(chosen),
            features=None,
            feature_rows=[self._first_row + parent for parent in parents],
            positions=[position] * len(chosen),
            rows=rows,
            visible=self._visible,
            wanted=len(chosen),
            children=self._children,
        )

    def take(self, children: Children) -> None:
        """See `TreeGrowth`."""
        if self._reading and self._draft.unread:
            return  # another chunk follows
        self._reading = False
        self._first_row = children.first_row
        paths = [self.candidates.path_of(candidate) for candidate in self._expanded]
        tokens, log_probs = children.best(self.width, paths, self._foresight)
        for token in itertools.chain(*tokens):
            if not 0 <= token < self._vocab_size:  # the target would end all texts of the pass
                raise DraftError(f"expected tokens from 0 to {self._vocab_size - 1}, got {token}")
        self.candidates.extend(self._expanded, tokens, log_probs)

    def fail(self, error: Exception) -> None:
        """See `TreeGrowth`. A text's guard stands before; without one it is the caller's."""
        self.abandon()
        raise error

    def abandon(self) -> None:
        """See `TreeGrowth`."""
        self._done = True
        self._draft.forget(self._drafted)
        self._drafted = 0
