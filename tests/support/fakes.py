"""Targets and drafts without a model: the target's rows are a fixed function of the text, so every answer can be
computed by hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from dovetail.runtime.drafts.base import Foresight, blind
from dovetail.runtime.policies.base import Growth
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, root_only

D = 4  # feature size
ENOUGH = 64  # candidates of a fake tree, about


def row(context: Sequence[int], vocab: int, salt: int = 0) -> Float32s:
    """[V] logits for the token after `context`: random, but always the same for the same last three tokens."""
    return _row(tuple(context[-3:]), vocab, salt)


@functools.cache
def _row(last: tuple[int, ...], vocab: int, salt: int) -> Float32s:
    return np.random.default_rng([salt, *last]).normal(0, 2, vocab).astype(np.float32)


@dataclasses.dataclass
class Output:
    logits: Float32s
    features: Float32s


def chain(root: int, drafted: list[int]) -> Tree:
    """Each drafted token the only child of the one before."""
    return Tree(np.array([root, *drafted], np.int64), np.arange(-1, len(drafted), dtype=np.int64))


class FakeTarget:
    """Keeps the text itself where the real one keeps a cache."""

    native_s = 0.0
    window: int | None = None

    def __init__(self, vocab: int = 12, salt: int = 0) -> None:
        self.vocab, self.salt = vocab, salt
        self.text: list[int] = []
        self.tree = root_only(0)

    @property
    def length(self) -> int:
        return len(self.text)

    def _feature(self, context: Sequence[int]) -> list[float]:
        return [len(context), *([-1, -1, -1, *context][-3:])]

    def prefill(self, tokens: Int64s) -> Output:
        features = []
        for token in tokens.tolist():
            self.text.append(token)
            features.append(self._feature(self.text))
        logits = row(self.text, self.vocab, self.salt)
        return Output(logits[None], np.array(features, np.float32))

    def verify(self, tree: Tree) -> Output:
        self.tree = tree
        paths: list[list[int]] = []
        for node in range(len(tree)):
            before = paths[tree.parents[node]] if node else self.text
            paths.append([*before, int(tree.tokens[node])])
        logits = np.stack([row(path, self.vocab, self.salt) for path in paths])
        return Output(logits, np.array([self._feature(path) for path in paths], np.float32))

    def commit(self, path: Sequence[int]) -> None:
        self.text += self.tree.tokens[list(path)].tolist()


class FakeDraft:
    """Proposes trees from `children(context) -> tokens`, and checks that it is fed the right features."""

    native_s = 0.0
    bytes_in = bytes_out = 0

    def __init__(self, children: Callable[[list[int]], list[int]]) -> None:
        self._children = children
        self.text: list[int] = []

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        """Breadth first, `growth.width` children a node, those that are foreseen first; all are as good as certain."""
        first = not self.text
        assert len(features) == len(tokens) - first
        for i, feature in enumerate(features):
            before = self.text + tokens[: i + first].tolist()
            assert feature.tolist() == [len(before), *([-1, -1, -1, *before][-3:])], "the feature of the token before"
        self.text += tokens.tolist()
        nodes, parents, paths = [self.text[-1]], [-1], [self.text]
        depth, level = 0, range(1)
        while level and len(nodes) < ENOUGH and growth.goes_on(depth, [0.0] * len(level)):
            for node in level:
                children = np.array(self._children(paths[node]))
                order = np.argsort(-foresight(depth + 1, children[None], np.zeros((1, len(children)), np.float32))[0])
                for token in children[order[: growth.width]].tolist():
                    nodes.append(token)
                    parents.append(node)
                    paths.append([*paths[node], token])
            depth, level = depth + 1, range(level.stop, len(nodes))
        kept = slice(0, 1 + growth.drafted([0.0] * (len(nodes) - 1)))
        return Tree(np.array(nodes[kept], np.int64), np.array(parents[kept], np.int64))


def good(target: FakeTarget) -> FakeDraft:
    """Knows the target's most likely tokens."""
    return FakeDraft(lambda context: np.argsort(-row(context, target.vocab, target.salt))[:4].tolist())


def never(target: FakeTarget) -> FakeDraft:
    """Offers only the token that the target likes least."""
    return FakeDraft(lambda context: [int(row(context, target.vocab, target.salt).argmin())])


def sometimes(target: FakeTarget) -> FakeDraft:
    """Tokens at random, repeated siblings included."""
    return FakeDraft(lambda context: np.random.default_rng([7, *context[-2:]]).integers(0, target.vocab, 3).tolist())
