"""What a draft's graph takes and gives: one call, its inputs and caches by name, and the engine that runs it.

Letters: T pairs in a call, F feature rows, M cache rows that a pair sees or not, R rows wanted, K children per row, H
key/value heads, E head size, D hidden size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dovetail.runtime.artifact.manifest import DraftInfo
from dovetail.runtime.drafts.base import Foresight, blind
from dovetail.runtime.errors import ArtifactError, DraftError
from dovetail.runtime.trees.tree import Float32s

if TYPE_CHECKING:
    from dovetail.runtime.drafts.model_draft import ModelDraft

TREE_ROWS = 1024  # cache rows for the expanded candidates of one tree
CALL_INPUTS = ("input_ids", "position_ids", "tree_mask", "cache_rows", "logit_rows")  # besides features and caches
CHILDREN_INPUT = "num_children"  # which graphs of earlier exports lack: their rows have all `top_k` children


@dataclasses.dataclass(frozen=True, slots=True)
class DraftCall:
    """One call of the graph. It writes keys and values to the T rows from `first_row` on, the last in use."""

    # Plain numbers, no arrays: behind a call that has read all weights the processor's caches are cold, and what numpy
    # does for a handful of numbers takes several times as long as the same in Python.

    tokens: Sequence[int]  # [T]
    features: Float32s | None  # [F, D] the target's; None: what the last call predicted, if it reads any
    feature_rows: Sequence[int]  # [T] which of them each pair reads
    positions: Sequence[int]  # [T]
    visible: Sequence[bytes]  # [T][M] which of the last M rows a pair sees, 1 or 0; it sees all before them
    first_row: int
    wanted: int  # R: the last so many pairs get children
    children: int  # K, each


@dataclasses.dataclass(frozen=True, slots=True)
class Children:
    """The best next tokens of the R rows wanted: K, or more from a graph that takes no number. Views of the engine's
    memory, valid until the next call.
    """

    tokens: npt.NDArray[np.int32]  # [R, K]
    log_probs: Float32s  # [R, K] descending

    def best(self, width: int, depth: int, foresight: Foresight) -> tuple[list[list[int]], list[list[float]]]:
        """The `width` best tokens of every row, `depth` levels below the root, and their log-probabilities.

        Raises `DraftError` where those are not numbers.
        """
        tokens, log_probs = self.tokens, self.log_probs
        if foresight is not blind:
            log_probs = foresight(depth, tokens, log_probs)
            if log_probs is not self.log_probs:
                order = np.argsort(-log_probs, axis=1, kind="stable")[:, :width]
                tokens = np.take_along_axis(tokens, order, axis=1)
                log_probs = np.take_along_axis(log_probs, order, axis=1)
        found = log_probs[:, :width].tolist()
        if not math.isfinite(sum(map(sum, found))):  # as is every sum with something that is none
            raise DraftError("the draft's log-probabilities are not numbers")
        return tokens[:, :width].tolist(), found


class DraftMemory(Protocol):
    """One text's keys, values and predicted features, on the device that computes with them."""

    bytes_in: int
    bytes_out: int

    def run(self, call: DraftCall) -> Children:
        """Call the graph. Predicted features stay where they are, for the next call."""
        ...


class DraftGraph(Protocol):
    """A loaded draft graph. Texts share it; calls come from one thread at a time."""

    info: DraftInfo
    native_s: float
    device: str

    def sequence(self) -> ModelDraft:
        """A new text."""
        ...


def cache_names(info: DraftInfo) -> list[str]:
    """Of the graph's cache inputs; the outputs' have `new_` in front."""
    return [f"{kind}_cache.{i}" for i in range(info.num_layers) for kind in ("key", "value")]


def cache_shape(info: DraftInfo, context_length: int) -> tuple[int, int]:
    """Of each cache of a text: [rows, H * E]."""
    return context_length + TREE_ROWS, info.num_kv_heads * info.head_dim


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
