"""The input arrays of a target call. Calls of one layout share them: OpenVINO is given the memory once, and later calls
only fill it. That is most of the host's time in a round.

Letters: S sequences, T tokens over all of them, N tokens and B blocks of one, R rows of logits over all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from dovetail.runtime.targets.openvino.pages import BlockTable
from dovetail.runtime.trees.tree import Bools, Int64s

LOGIT_ROWS = "logit_rows"

Layout = tuple[tuple[int, int, bool, int], ...]
"""Per sequence: N, B, whether it has a mask, its rows of logits. Calls of one layout have inputs of equal shapes."""


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceStep:
    """What one sequence feeds into a call: N tokens behind the `length` tokens its table holds."""

    table: BlockTable
    tokens: Int64s  # [N]
    positions: Int64s  # [N]
    mask: Bools | None  # [N, N] ancestor-or-self; None: causal
    logit_rows: Int64s  # rows of this step, 0..N-1


def layout_of(steps: Sequence[SequenceStep]) -> Layout:
    """The layout of a call with these steps."""
    return tuple((len(s.tokens), len(s.table.blocks), s.mask is not None, len(s.logit_rows)) for s in steps)


class Feeds:
    """Inputs of one layout: numpy arrays, and the tensors that show OpenVINO the same memory."""

    def __init__(self, layout: Layout) -> None:
        self.tokens = _offsets([n for n, _, _, _ in layout])  # where each sequence's tokens begin, and the end of all
        self.rows = _offsets([rows for _, _, _, rows in layout])
        self._blocks = _offsets([blocks for _, blocks, _, _ in layout])
        self._masks = _offsets([n * n if masked else 0 for n, _, masked, _ in layout])
        count, mask_size = self.tokens[-1], self._masks[-1]
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.empty(count, np.int64),  # [T]
            "position_ids": np.empty(count, np.int64),  # [T]
            "past_lens": np.empty(len(layout), np.int32),  # [S]
            "subsequence_begins": np.array(self.tokens, np.int32),  # [S + 1]
            "block_indices": np.empty(self._blocks[-1], np.int32),  # [sum B]
            "block_indices_begins": np.array(self._blocks, np.int32),  # [S + 1]
            "max_context_len": np.empty((), np.int32),
            "qq_bias": np.empty(mask_size, np.uint8),  # [sum N * N]
            "qq_bias_begins": np.array(self._masks if mask_size else [], np.int32),  # [S + 1], empty without masks
            LOGIT_ROWS: np.empty(self.rows[-1], np.int64),  # [R]
        }
        self._tensors = {name: ov.Tensor(array, shared_memory=True) for name, array in self._arrays.items()}

    def bind(self, request: ov.InferRequest) -> None:
        """Make `request` read these inputs."""
        for name, tensor in self._tensors.items():
            request.set_tensor(name, tensor)

    def fill(self, steps: Sequence[SequenceStep]) -> None:
        """Write the steps, which must have this layout, into the arrays."""
        arrays = self._arrays
        longest = 0
        for i, step in enumerate(steps):
            tokens = slice(self.tokens[i], self.tokens[i + 1])
            arrays["input_ids"][tokens] = step.tokens
            arrays["position_ids"][tokens] = step.positions
            arrays["past_lens"][i] = step.table.length
            arrays["block_indices"][self._blocks[i] : self._blocks[i + 1]] = step.table.blocks
            if step.mask is not None:
                arrays["qq_bias"][self._masks[i] : self._masks[i + 1]] = step.mask.ravel()
            arrays[LOGIT_ROWS][self.rows[i] : self.rows[i + 1]] = step.logit_rows + self.tokens[i]
            longest = max(longest, step.table.length + len(step.tokens))
        arrays["max_context_len"][()] = longest


def _offsets(counts: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)]
