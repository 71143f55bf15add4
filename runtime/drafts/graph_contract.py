"""What a draft's graph takes and gives: one call, its inputs and caches by name, and the engine that runs it.

A graph holds the keys and values of all its texts in one pool of rows. A call writes a row for every pair, wherever
there is room, and a mask says which rows each pair sees. So the pairs of several texts share a call: none sees the
others' rows.

    input            shape    what
    input_ids        [T]      tokens of the pairs
    features         [F, D]   float16: the target's, or what the last call predicted; not of a language model
    feature_rows     [T]      which of them each pair reads
    position_ids     [T]      for the rotary embedding; only differences count
    cache_rows       [T]      where each pair's keys and values are written
    tree_mask        [T, M]   bool: which of the last M rows of the caches each pair sees; it sees all before them
    logit_rows       [R]      which pairs get children
    num_children     [1]      K; graphs of early exports lack it and give `top_k` children
    key_cache.i, value_cache.i   [C, H * E] float32: the first C rows of the pool

    output           shape
    top_token_ids    [R, K]   int32
    top_log_probs    [R, K]   float32, descending
    hidden_states    [R, D]   float16: predicted features of these pairs
    new_key_cache.i, new_value_cache.i   the caches with the new rows; bound to the same memory

Letters: T pairs in a call, F feature rows, M columns of the mask, C cache rows, R rows wanted, K children per row, H
key/value heads, E head size, D hidden size.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dovetail.runtime.artifact.manifest import DraftInfo
from dovetail.runtime.drafts.base import Foresight, blind
from dovetail.runtime.drafts.row_pool import ROWS_A_BLOCK, RowPool
from dovetail.runtime.errors import ArtifactError, DraftError
from dovetail.runtime.trees.tree import Float32s

CALL_INPUTS = ("input_ids", "position_ids", "tree_mask", "cache_rows", "logit_rows")  # besides features and caches
CHILDREN_INPUT = "num_children"


@dataclasses.dataclass(frozen=True, slots=True)
class DraftCall:
    """What one text asks of the graph."""

    # Plain numbers, no arrays: behind a call that has read all weights the processor's caches are cold, and what numpy
    # does for a handful of numbers takes several times as long as the same in Python.

    tokens: Sequence[int]  # [T]
    features: Float32s | None  # [F, D] the target's; None: what the last call predicted, if it reads any
    feature_rows: Sequence[int]  # [T] which of them each pair reads
    positions: Sequence[int]  # [T]
    rows: Sequence[int]  # [T] of the pool, where each pair is written
    visible: Sequence[bytes]  # [T] which rows of the pool a pair sees, 1 or 0, from the first on; none behind the end
    wanted: int  # R: the last so many pairs get children
    children: int  # K, each
    reads_text: bool = False  # verified pairs, not candidates
    is_last: bool = True  # nothing verified is left to read behind it: its children are the tree's first level


@dataclasses.dataclass(frozen=True, slots=True)
class Children:
    """The best next tokens of the R rows that a text wanted: K, or more from a graph that takes no number. Views of the
    engine's memory, valid until the next call.
    """

    tokens: npt.NDArray[np.int32]  # [R, K]
    log_probs: Float32s  # [R, K] descending
    first_row: int = 0  # where this text's rows begin among the predicted features of the call

    def best(
        self, width: int, paths: Sequence[Sequence[int]], foresight: Foresight
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The `width` best tokens of every row, and their log-probabilities; `paths` [R] lead to the rows.

        Raises `DraftError` where those are not numbers.
        """
        tokens, log_probs = self.tokens, self.log_probs
        if foresight is not blind:
            log_probs = foresight(paths, tokens, log_probs)
            if log_probs is not self.log_probs:
                order = np.argsort(-log_probs, axis=1, kind="stable")[:, :width]
                tokens = np.take_along_axis(tokens, order, axis=1)
                log_probs = np.take_along_axis(log_probs, order, axis=1)
        values = log_probs[:, :width].tolist()
        if not math.isfinite(sum(map(sum, values))):  # as is every sum with something that is none
            raise DraftError("the draft's log-probabilities are not numbers")
        return tokens[:, :width].tolist(), values


class DraftGraph(Protocol):
    """A loaded graph and the pool of rows that its texts share. Calls come from one thread at a time."""

    info: DraftInfo
    device: str
    pool: RowPool
    native_s: float  # seconds spent inside its engine so far
    bytes_in: int  # handed to its device so far
    bytes_out: int  # taken from it

    def run(self, calls: Sequence[DraftCall]) -> list[Children]:
        """One call for several texts; either all of them bring features, or none does. Predicted features stay where
        they are, for the next call.
        """
        ...

    def clear(self, rows: Sequence[int]) -> None:
        """Zero these rows of the pool: a mask does not keep out what is no number."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class JointCall:
    """The calls of several texts as one."""

    tokens: list[int]  # [T]
    positions: list[int]  # [T]
    rows: list[int]  # [T]
    feature_rows: list[int]  # [T]
    features: list[Float32s] | None  # [F, D] together
    logit_rows: list[int]  # [R]
    cache_rows: int  # C
    mask: bytes  # [T, M]
    columns: int  # M
    children: int  # K
    wanted: list[int]  # R of every text

    @property
    def num_features(self) -> int | None:
        """F; None: those that the last call predicted are read."""
        return None if self.features is None else sum(map(len, self.features))

    def split(self, tokens: npt.NDArray[np.int32], log_probs: Float32s) -> list[Children]:
        """Every text's part of the children [R, K]."""
        ends = list(itertools.accumulate(self.wanted, initial=0))
        return [Children(tokens[a:b], log_probs[a:b], a) for a, b in itertools.pairwise(ends)]


def join(calls: Sequence[DraftCall]) -> JointCall:
    """One call for all of `calls`. Caches and mask are as large as the rows that any pair sees or writes, in steps of
    `ROWS_A_BLOCK`; of rows that every pair sees the mask has no columns.
    """
    in_use = max(max(map(len, call.visible)) for call in calls)
    cache_rows = -(-in_use // ROWS_A_BLOCK) * ROWS_A_BLOCK
    seen_by_all = min(len(row) - len(row.lstrip(b"\1")) for call in calls for row in call.visible)
    first = min(seen_by_all, cache_rows - ROWS_A_BLOCK) // ROWS_A_BLOCK * ROWS_A_BLOCK
    columns = cache_rows - first
    mask = b"".join([row[first:].ljust(columns, b"\0") for call in calls for row in call.visible])
    feature_rows: list[int] = []
    logit_rows: list[int] = []
    num_features = begin = 0
    for call in calls:
        if call.features is None:
            feature_rows += call.feature_rows
        else:
            feature_rows += [row + num_features for row in call.feature_rows]
            num_features += len(call.features)
        end = begin + len(call.tokens)
        logit_rows += range(end - call.wanted, end)
        begin = end
    return JointCall(
        tokens=[token for call in calls for token in call.tokens],
        positions=[position for call in calls for position in call.positions],
        rows=[row for call in calls for row in call.rows],
        feature_rows=feature_rows,
        features=None if calls[0].features is None else [call.features for call in calls if call.features is not None],
        logit_rows=logit_rows,
        cache_rows=cache_rows,
        mask=mask,
        columns=columns,
        children=max(call.children for call in calls),
        wanted=[call.wanted for call in calls],
    )


def cache_names(info: DraftInfo) -> list[str]:
    """Of the graph's cache inputs; the outputs' have `new_` in front."""
    return [f"{kind}_cache.{i}" for i in range(info.num_layers) for kind in ("key", "value")]


def row_bytes(info: DraftInfo) -> int:
    """Of one row of the pool, over all caches."""
    return 4 * info.num_kv_heads * info.head_dim * 2 * info.num_layers


def check_inputs(got: dict[str, Any], info: DraftInfo, path: Path) -> None:
    """The graph has the inputs and last sizes that the manifest says; `got`: name -> last size, None where it is free.

    Raises `ArtifactError`.
    """
    expected: dict[str, Any] = dict.fromkeys(CALL_INPUTS)
    expected |= {"features": info.hidden_size, "feature_rows": None} if info.reads_features else {}
    expected |= dict.fromkeys(cache_names(info), info.num_kv_heads * info.head_dim)
    expected |= {CHILDREN_INPUT: 1} if CHILDREN_INPUT in got else {}
    if got != expected:
        raise ArtifactError(f"{path}: expected the inputs {expected}, got {got}; export the artifact again")
