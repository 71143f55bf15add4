"""The input arrays of a target's pass: memory that OpenVINO is shown, and that every pass fills anew.

An input of the size it had in the pass before stays as it is bound; naming memory to OpenVINO is most of the host's
time in a round of one text.

Letters: S sequences, T tokens over all of them, N tokens and P pages of one, R rows of logits over all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from dovetail.runtime.targets.base import Step
from dovetail.runtime.targets.openvino.pages import PageTable

LOGIT_ROWS = "logit_rows"

_DTYPES: dict[str, type[np.generic]] = {
    "input_ids": np.int64,  # [T]
    "position_ids": np.int64,  # [T]
    "past_lens": np.int32,  # [S]
    "subsequence_begins": np.int32,  # [S + 1]
    "block_indices": np.int32,  # [sum P]
    "block_indices_begins": np.int32,  # [S + 1]
    "qq_bias": np.uint8,  # [sum N * N] ancestor-or-self matrices, of sequences that need one
    "qq_bias_begins": np.int32,  # [S + 1], empty without masks
    LOGIT_ROWS: np.int64,  # [R]
}
_FIRST_SIZE = 512
_KEPT_SIZES = 256  # of one input: a tensor each, a few hundred bytes


class Inputs:
    """The inputs of one infer request."""

    def __init__(self, request: ov.InferRequest) -> None:
        self._request = request
        self._buffers = {name: _Buffer(dtype) for name, dtype in _DTYPES.items()}
        self._bound: dict[str, int] = {}  # size of every input that the request reads now
        self._longest = np.empty((), np.int32)
        request.set_tensor("max_context_len", ov.Tensor(self._longest, shared_memory=True))

    def fill(self, steps: Sequence[Step], tables: Sequence[PageTable]) -> tuple[list[int], list[int]]:
        """Write the steps, whose sequences hold `tables`, and make the request read them.

        Returns where each step's tokens begin among the T, and its rows of logits among the R, with the end of all.
        """
        trees = [step.tree for step in steps]
        pasts = [table.length for table in tables]
        chains = [tree.is_chain() for tree in trees]
        tokens = _offsets([len(tree) for tree in trees])
        rows = _offsets([len(step.logit_rows) for step in steps])
        masks = _offsets([0 if chain else len(tree) ** 2 for tree, chain in zip(trees, chains, strict=True)])
        pages = _offsets([len(table.pages) for table in tables])

        arrays = {
            "input_ids": self._array("input_ids", tokens[-1]),
            "position_ids": self._array("position_ids", tokens[-1]),
            "qq_bias": self._array("qq_bias", masks[-1]),
            LOGIT_ROWS: self._array(LOGIT_ROWS, rows[-1]),
        }
        for i, (step, tree, past) in enumerate(zip(steps, trees, pasts, strict=True)):
            begin, end = tokens[i], tokens[i + 1]
            arrays["input_ids"][begin:end] = tree.tokens
            arrays["position_ids"][begin:end] = past + (np.arange(end - begin) if chains[i] else tree.depths())
            if not chains[i]:
                arrays["qq_bias"][masks[i] : masks[i + 1]] = tree.ancestors().ravel()
            arrays[LOGIT_ROWS][rows[i] : rows[i + 1]] = [begin + node for node in step.logit_rows]
        self._array("past_lens", len(steps))[:] = pasts
        self._array("subsequence_begins", len(tokens))[:] = tokens
        self._array("block_indices", pages[-1])[:] = [*itertools.chain(*(table.pages for table in tables))]
        self._array("block_indices_begins", len(pages))[:] = pages
        begins = masks if masks[-1] else []
        self._array("qq_bias_begins", len(begins))[:] = begins
        self._longest[()] = max(past + len(tree) for past, tree in zip(pasts, trees, strict=True))
        return tokens, rows

    def _array(self, name: str, size: int) -> npt.NDArray[Any]:
        """The memory of an input of this size, bound."""
        array, tensor = self._buffers[name].of_size(size)
        if self._bound.get(name) != size:
            self._request.set_tensor(name, tensor)
            self._bound[name] = size
        return array


class _Buffer:
    """Memory of one input, and the tensors that show OpenVINO the front of it."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._memory = np.empty(_FIRST_SIZE, dtype)
        self._views: dict[int, tuple[npt.NDArray[Any], ov.Tensor]] = {}

    def of_size(self, size: int) -> tuple[npt.NDArray[Any], ov.Tensor]:
        view = self._views.get(size)
        if view is None:
            if size > len(self._memory):
                self._memory = np.empty(max(size, 2 * len(self._memory)), self._memory.dtype)
                self._views.clear()
            elif len(self._views) >= _KEPT_SIZES:
                self._views.clear()
            array = self._memory[:size]
            view = self._views[size] = (array, ov.Tensor(array, shared_memory=True))
        return view


def _offsets(counts: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)]
