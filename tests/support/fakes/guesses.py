"""Drafts without a model that guess what the fake target's rows say, and check that they are told the truth of it.

Letters: R rows of candidates, K children per row, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from fakes.target import D, FakeTarget, row_after

from dovetail.runtime.artifact.manifest import DraftInfo
from dovetail.runtime.drafts.base import Foresight, Grown, TreeGrowth, blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.drafts.row_pool import RowPool
from dovetail.runtime.policies.base import TreeBudget
from dovetail.runtime.trees.tree import CandidateTree
from dovetail.runtime.trees.verified import Verified

ENOUGH = 64  # candidates of a fake tree, about

Guess = Callable[[list[int]], list[int]]
"""A text, or what a draft knows of it -> the tokens that may come next, the best first."""


class FakeDraft:
    """See `Draft`. Grows trees from `guess`, and checks that it is told the right features."""

    def __init__(self, guess: Guess) -> None:
        self._guess = guess
        self._begin = 0  # of what it knows
        self.text: list[int] = []  # from there on

    @property
    def known(self) -> int:
        """See `Draft`."""
        return max(self._begin + len(self.text) - 1, 0)

    def tell(self, verified: Verified) -> None:
        """See `Draft`. Behind a gap it begins anew."""
        if verified.begin > self.known:
            self.text, self._begin = [], verified.begin
        begin, tokens = verified.begin, verified.tokens.tolist()
        if begin < self._begin:
            self.text, self._begin = [], begin
        kept = begin - self._begin
        common = list(zip(self.text[kept:], tokens, strict=False))
        assert all(a == b for a, b in common), "another text than the one that it knows"
        if len(tokens) > len(common):
            self.text = self.text[:kept] + tokens
        for i, got in enumerate(verified.features.tolist()):
            end = kept + i + 1  # of the feature's token
            known = self.text[max(end - 3, 0) : end]
            assert got[0] == begin + i + 1, "a feature of another position"
            assert got[D - len(known) :] == known, "a feature of other tokens"

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> TreeGrowth:
        """See `Draft`. Breadth first, `budget.width` children a node, those that are foreseen first; all are as good as
        certain.
        """
        text = self.text or [root]
        assert text[-1] == root, "the last token that it was told of"
        candidates = CandidateTree(root)
        level = range(1)
        while len(candidates) < ENOUGH and budget.wants_level(candidates.levels):
            parents, tokens = [], []
            for candidate in level:
                path = candidates.path_of(candidate)
                guesses = np.array(self._guess([*text, *path]))
                foreseen = foresight([path], guesses[None], np.zeros((1, len(guesses)), np.float32))[0]
                chosen = guesses[np.argsort(-foreseen, kind="stable")[: budget.width]].tolist()
                tokens += chosen
                parents += [candidate] * len(chosen)
            if not tokens:
                break
            first = candidates.add_level(parents, tokens, [0.0] * len(tokens))
            level = range(first, first + len(tokens))
        return Grown(candidates)

    def truncate(self, known: int) -> None:
        """See `Draft`."""
        assert 0 <= known <= self.known
        if known <= self._begin:
            self.text, self._begin = [], 0
            if known:  # it knows that there was something
                self._begin = known + 1
        else:
            del self.text[known + 1 - self._begin :]

    def close(self) -> None:
        """See `Draft`."""
        self.truncate(0)


def good(target: FakeTarget) -> FakeDraft:
    """Knows the target's most likely tokens."""
    return FakeDraft(best(target))


def never(target: FakeTarget) -> FakeDraft:
    """Offers only the token that the target likes least."""
    return FakeDraft(worst(target))


def sometimes(target: FakeTarget) -> FakeDraft:
    """Tokens at random, repeated siblings included."""
    return FakeDraft(random(target))


def best(target: FakeTarget) -> Guess:
    """The target's most likely tokens, as far as the last three say."""
    return lambda context: np.argsort(-row_after(context, target.vocab, target.salt))[:4].tolist()


def worst(target: FakeTarget) -> Guess:
    """Only the token that the target likes least."""
    return lambda context: [int(row_after(context, target.vocab, target.salt).argmin())]


def random(target: FakeTarget) -> Guess:
    """Tokens at random, repeated siblings included."""
    return lambda context: _random(tuple(context[-2:]), target.vocab)


@functools.cache
def _random(last: tuple[int, ...], vocab: int) -> list[int]:
    tokens: list[int] = np.random.default_rng([7, *last]).integers(0, vocab, 3).tolist()
    return tokens


class FakeGraph:
    """See `DraftGraph`. Remembers which token each row of the pool holds, so that it knows the text of every pair from
    what the mask shows, and checks that this is a text, and the pair's feature that of its end.
    """

    device = "fake"
    native_s = 0.0
    bytes_in = bytes_out = 0

    def __init__(self, guess: Guess, vocab: int = 12, *, max_rows: int = 4096, kind: str = "dgf") -> None:
        """`guess` gets what a text's draft has read of it, which may be its end alone."""
        self.info = DraftInfo(kind, D, vocab, 1, 1, 1, 4, 1, "float32")
        self.pool = RowPool(max_rows)
        self.watch: Callable[[Sequence[DraftCall]], None] = lambda calls: None  # called before and behind every call
        self._guess = guess
        self._rows: dict[int, tuple[int, int]] = {}  # row of the pool -> position, token
        self._predicted: list[list[int]] = []  # by the last call's wanted pairs: the text up to there
        self._lent: list[Children] = []

    def run(self, calls: Sequence[DraftCall]) -> list[Children]:
        """See `DraftGraph`."""
        for children in self._lent:
            children.log_probs.fill(np.nan)
            children.tokens.fill(-1)
        written = [row for call in calls for row in call.rows]
        assert len(set(written)) == len(written), "two pairs in one row"
        self.clear(written)  # until the call is through, nobody knows what is there
        self.watch(calls)
        for call in calls:
            for row, position, token in zip(call.rows, call.positions, call.tokens, strict=True):
                self._rows[row] = position, token
        predicted, self._lent, first = [], [], 0
        for call in calls:
            texts = [self._text(visible) for visible in call.visible]
            if self.info.reads_features:
                self._check_features(call, texts)
            wanted = texts[len(texts) - call.wanted :]
            self._lent.append(self._children(wanted, call.children, first))
            predicted += wanted
            first += len(wanted)
        self._predicted = predicted
        self.watch(calls)
        return self._lent

    def clear(self, rows: Sequence[int]) -> None:
        """See `DraftGraph`."""
        for row in rows:
            self._rows.pop(row, None)

    def _text(self, visible: bytes) -> list[int]:
        rows = sorted(self._rows[row] for row, sees in enumerate(visible) if sees)
        assert [position for position, _ in rows] == list(range(len(rows))), "a pair sees no text"
        return [token for _, token in rows]

    def _check_features(self, call: DraftCall, texts: list[list[int]]) -> None:
        for i, text in enumerate(texts):
            if call.features is None:
                assert self._predicted[call.feature_rows[i]] == text[:-1], "the predicted feature of another pair"
            else:
                before = text[-4:-1]
                end = call.features[call.feature_rows[i]].tolist()[D - len(before) :]
                assert end == before, "the feature of another token"

    def _children(self, texts: list[list[int]], count: int, first: int) -> Children:
        tokens = np.empty((len(texts), count), np.int32)
        for i, text in enumerate(texts):
            guesses = self._guess(text)
            tokens[i] = (guesses * count)[:count]
        log_probs = np.log(0.6 * 0.4 ** np.arange(count, dtype=np.float32))[None].repeat(len(texts), axis=0)
        return Children(tokens, log_probs.astype(np.float32), first)
