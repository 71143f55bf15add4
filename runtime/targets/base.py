"""The target: the model whose words count. An engine runs it, one pass over the weights for all texts at a time.

Letters: S sequences in a pass, N nodes of one sequence's tree, R of them whose logits are wanted, V vocabulary, D
hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from dovetail.runtime.artifact.manifest import TargetInfo
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, chain

Numerics = Literal["fast", "exact"]
Acceptance = Literal["confirmed", "relaxed"]
"""Whether every token is drawn from a row that plain decoding has, too, bit for bit; or from rows as they come."""

PREFILL_CHUNK = 256  # tokens a pass: an interrupt is only seen between passes


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What one sequence feeds into a pass: the nodes of `tree` behind the tokens in its cache.

    `wanted` are the nodes whose logits are computed, ascending; None stands for all. `is_prompt`: the tree is a chain
    of tokens that were given, not drawn. There are two ways to compute a row, in blocks and each alone, and their sums
    are ordered differently; a text's bits are its own only if each of its tokens is always computed in one of them
    (docs/lossless.md). What is given is read in blocks, what is drawn is verified row by row.
    """

    sequence: TargetSequence
    tree: Tree
    wanted: Sequence[int] | None = None
    is_prompt: bool = False

    @property
    def logit_rows(self) -> Sequence[int]:
        """[R] nodes whose logits are computed."""
        return range(len(self.tree)) if self.wanted is None else self.wanted


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutput:
    """What one sequence gets back. Views of the engine's memory: valid until the next pass."""

    logits: Float32s  # [R, V]
    features: Float32s  # [N, D] last hidden state, after the final norm


class TargetSequence(Protocol):
    """One text's place in the target's cache.

    The last token of a text is never in it: it is the root of the next tree, and its row says what comes next.
    """

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    def set_text_length(self, length: int) -> None:
        """The text has `length` tokens. Where that makes other rows of all its tokens (`TargetInfo.rope_border`), those
        in the cache are forgotten.
        """
        ...

    def reserve(self, num_tokens: int) -> None:
        """Make sure that `num_tokens` more tokens fit. Raises `CacheFullError`, changing nothing."""
        ...

    def reserve_tree(self, tree: Tree) -> None:
        """Make sure that `tree` fits behind the tokens, and what its siblings need beside. Raises `CacheFullError`,
        changing nothing.
        """
        ...

    def commit(self, path: Sequence[int]) -> None:
        """Keep the nodes `path` (root first, ascending) of the tree that was fed last, and drop its others.

        Between a pass and its `commit` nothing else is done with the sequence.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on and give back what only they used."""
        ...

    def fork(self) -> TargetSequence:
        """Another sequence that holds the same tokens; from here on each goes its own way, and has to `reserve` anew.

        Raises `CacheFullError`, or leaves that to the first `reserve`.
        """
        ...

    def close(self) -> None:
        """Give everything back. The sequence is empty then, and may be used again."""
        ...


class TargetEngine(Protocol):
    """A loaded target and its cache. Calls come from one thread at a time, but for `abandon`."""

    @property
    def info(self) -> TargetInfo: ...
    @property
    def numerics(self) -> Numerics: ...

    @property
    def acceptance(self) -> Acceptance: ...

    @property
    def window(self) -> int | None:
        """Where past and tree together are longer, only chains may be fed; None: trees may be fed anywhere."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds, over all sequences."""
        ...

    @property
    def free(self) -> int:
        """Tokens of `capacity` that no sequence has taken, in whole pages."""
        ...

    def sequence(self) -> TargetSequence:
        """A new, empty sequence."""
        ...

    def forward(self, steps: Sequence[Step], rows: int = 0) -> list[StepOutput]:
        """One pass over the weights for all `steps`, each of another sequence. Raises `CacheFullError`.

        Keys and values are written behind each sequence's `length`, which stays: `commit` says what of them counts. A
        pass that has less than `rows` rows is filled up with some that nobody reads. Raises `PassAbandonedError` behind
        an `abandon`.
        """
        ...

    def abandon(self) -> None:
        """End the pass that runs now, as far as it can be ended; without one nothing happens. From any thread."""
        ...

    def close(self) -> None:
        """Free the model. The engine can't be used afterwards."""
        ...


def read(engine: TargetEngine, sequence: TargetSequence, tokens: Int64s) -> StepOutput:
    """Append `tokens` [N] to a sequence's cache, a chunk a pass. Returns the features [N, D] of all, and the logits
    [1, V] of the last ([0, V] of none): no other row goes through the LM head.
    """
    logits = np.empty((0, engine.info.vocab_size), np.float32)
    features = np.empty((len(tokens), engine.info.hidden_size), np.float32)
    for begin in range(0, len(tokens), PREFILL_CHUNK):
        chunk = tokens[begin : begin + PREFILL_CHUNK]
        is_last = begin + len(chunk) == len(tokens)
        wanted = [len(chunk) - 1] if is_last else []
        out = engine.forward([Step(sequence, chain(chunk), wanted, is_prompt=True)])[0]
        logits, features[begin : begin + len(chunk)] = out.logits, out.features
        sequence.commit(range(len(chunk)))
    return StepOutput(logits, features)
