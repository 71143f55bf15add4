"""A target without a model: its rows are a fixed function of the text, so every answer can be computed by hand.

Letters: V vocabulary, D feature size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from dovetail.runtime.artifact.manifest import TargetInfo
from dovetail.runtime.errors import CacheFullError
from dovetail.runtime.targets.base import Acceptance, Numerics, Step, StepOutput
from dovetail.runtime.trees.tree import Float32s, Tree

D = 4  # feature size
PAGE = 4  # tokens


def row_after(context: Sequence[int], vocab: int, salt: int = 0) -> Float32s:
    """[V] logits for the token after `context`: random, but always the same for the same last three tokens."""
    return _row(tuple(context[-3:]), vocab, salt)


@functools.cache
def _row(last: tuple[int, ...], vocab: int, salt: int) -> Float32s:
    return np.random.default_rng([salt, *last]).normal(0, 2, vocab).astype(np.float32)


def feature(context: Sequence[int]) -> list[float]:
    """[D] what the target's last layer says of the last token of `context`: where it stands, and the last three."""
    return [len(context), *([-1, -1, -1, *context][-3:])]


def chain(root: int, drafted: list[int]) -> Tree:
    """Each drafted token the only child of the one before."""
    return Tree(np.array([root, *drafted], np.int64), np.arange(-1, len(drafted), dtype=np.int64))


class FakeTarget:
    """See `TargetEngine`. Keeps the texts themselves where the real one keeps a cache, in pages that are not shared.

    What a pass gave is spoilt by the next one, as the protocol allows: who keeps a view of it reads NaN.
    """

    numerics: Numerics = "exact"
    acceptance: Acceptance = "confirmed"

    def __init__(
        self,
        vocab: int = 12,
        salt: int = 0,
        *,
        capacity: int = 4096,
        window: int | None = None,
        remembers: bool = False,
    ) -> None:
        """`remembers`: every token of the text counts, and not only the last three."""
        self.vocab, self.salt, self.window = vocab, salt, window
        self.info = TargetInfo("fake", D, 1, vocab, 1 << 20, 1, "fp32", window)
        self.capacity = self.free = capacity // PAGE * PAGE
        self.watch: Callable[[Sequence[Step]], None] = lambda steps: None  # called before and behind every pass
        self.touch: Callable[[], None] = lambda: None  # called before and behind what else a text does with its cache
        self._remembers = remembers
        self._lent: list[StepOutput] = []

    def row(self, context: Sequence[int]) -> Float32s:
        """[V] logits for the token after `context`."""
        logits = row_after(context, self.vocab, self.salt)
        if self._remembers:  # of numbers Python's hash is the same in every process
            logits = logits + 0.5 * row_after([hash(tuple(context)) % 1009], self.vocab, self.salt + 1)
        return logits

    def sequence(self) -> FakeSequence:
        """See `TargetEngine`."""
        return FakeSequence(self)

    def forward(self, steps: Sequence[Step], rows: int = 0) -> list[StepOutput]:
        """See `TargetEngine`."""
        for out in self._lent:
            out.logits.fill(np.nan)
            out.features.fill(np.nan)
        assert steps, "a pass of nothing"
        assert len({id(step.sequence) for step in steps}) == len(steps), "a sequence twice in a pass"
        self.watch(steps)
        self._lent = [self._output(step) for step in steps]
        self.watch(steps)
        return self._lent

    def abandon(self) -> None:
        """See `TargetEngine`. Its passes are short."""

    def close(self) -> None:
        """See `TargetEngine`."""

    def _output(self, step: Step) -> StepOutput:
        sequence, tree = step.sequence, step.tree
        assert isinstance(sequence, FakeSequence)
        beyond = self.window is not None and sequence.length + len(tree) > self.window
        assert tree.is_chain() or not beyond, "siblings beyond the attention window"
        assert tree.is_chain() or not step.is_prompt, "a prompt with siblings"
        sequence.feed(tree)
        paths: list[list[int]] = []
        for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
            paths.append([*(sequence.tokens if parent < 0 else paths[parent]), token])
        logits = np.empty((len(step.logit_rows), self.vocab), np.float32)
        for i, node in enumerate(step.logit_rows):
            logits[i] = self.row(paths[node])
        return StepOutput(logits, np.array([feature(path) for path in paths], np.float32))


class FakeSequence:
    """See `TargetSequence`."""

    def __init__(self, engine: FakeTarget) -> None:
        self.tokens: list[int] = []
        self._engine = engine
        self._room = 0  # tokens that its pages hold
        self._fed: Tree | None = None  # may be committed

    @property
    def length(self) -> int:
        """See `TargetSequence`."""
        return len(self.tokens)

    def reserve(self, num_tokens: int) -> None:
        """See `TargetSequence`."""
        self._engine.touch()
        lacking = max(_in_pages(self.length + num_tokens) - self._room, 0)
        if lacking > self._engine.free:
            raise CacheFullError(f"expected {lacking} free tokens in the cache, got {self._engine.free}")
        self._engine.free -= lacking
        self._room += lacking

    def reserve_tree(self, tree: Tree) -> None:
        """See `TargetSequence`."""
        self.reserve(len(tree))

    def feed(self, tree: Tree) -> None:
        """The engine's pass has `tree` behind the tokens."""
        self.reserve(len(tree))
        self._fed = tree

    def commit(self, path: Sequence[int]) -> None:
        """See `TargetSequence`."""
        assert self._fed is not None, "no tree was fed since the last commit or truncate"
        self._engine.touch()
        tokens, parents = self._fed.tokens.tolist(), self._fed.parents.tolist()
        assert [parents[node] for node in path] == [-1, *path][: len(path)], "a path begins at the root"
        self.tokens += [tokens[node] for node in path]
        self._fed = None
        self._engine.touch()

    def truncate(self, length: int) -> None:
        """See `TargetSequence`."""
        assert 0 <= length <= self.length
        del self.tokens[length:]
        self._engine.free += self._room - _in_pages(length)
        self._room, self._fed = _in_pages(length), None

    def set_text_length(self, length: int) -> None:
        """See `TargetSequence`."""

    def fork(self) -> FakeSequence:
        """See `TargetSequence`."""
        other = FakeSequence(self._engine)
        other.reserve(self.length)
        other.tokens = self.tokens.copy()
        return other

    def close(self) -> None:
        """See `TargetSequence`."""
        self.truncate(0)


def _in_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE) * PAGE
