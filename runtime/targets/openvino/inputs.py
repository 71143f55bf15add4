"""The input arrays of a target's pass: memory that OpenVINO is shown, and that every pass fills anew.

An input of the size it had in the pass before stays as it is bound; naming memory to OpenVINO is most of the host's
time in a round of one text.

Letters: S subsequences, T tokens over all of them, N tokens and P pages of one, R rows of logits over all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from dovetail.runtime.artifact.manifest import LONG_POSITIONS
from dovetail.runtime.targets.openvino.layout import Rows

LOGIT_ROWS = "logit_rows"

_DTYPES: dict[str, type[np.generic]] = {
    "input_ids": np.int64,  # [T]
    "position_ids": np.int64,  # [T]
    "past_lens": np.int32,  # [S]
    "subsequence_begins": np.int32,  # [S + 1]
    "block_indices": np.int32,  # [sum P]
    "block_indices_begins": np.int32,  # [S + 1]
    "qq_bias": np.uint8,  # [sum N * N] ancestor-or-self matrices, of subsequences that need one
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

    def fill(self, parts: Sequence[Rows], logit_rows: Sequence[int]) -> None:
        """Write the rows of a pass, and which of them [R] want logits, and make the request read them."""
        tokens = _offsets([len(part) for part in parts])
        pasts = [past for part in parts for past in range(part.past, part.past + part.subsequences)]
        begins = [0]
        pages: list[int] = []
        page_begins = [0]
        for part, end in zip(parts, tokens[1:], strict=True):
            for _ in range(part.subsequences):
                pages += part.pages
                page_begins.append(len(pages))
                begins.append(begins[-1] + 1 if part.are_alone else end)
        ids = self._array("input_ids", tokens[-1])
        positions = self._array("position_ids", tokens[-1])
        for part, (begin, end) in zip(parts, itertools.pairwise(tokens), strict=True):
            ids[begin:end] = part.tokens
            positions[begin:end] = part.depths
            positions[begin:end] += part.past + (LONG_POSITIONS if part.is_long else 0)
        self._array(LOGIT_ROWS, len(logit_rows))[:] = logit_rows
        self._array("past_lens", len(pasts))[:] = pasts
        self._array("subsequence_begins", len(begins))[:] = begins
        self._array("block_indices", len(pages))[:] = pages
        self._array("block_indices_begins", len(page_begins))[:] = page_begins
        self._fill_masks(parts)
        self._longest[()] = max(part.past + len(part) for part in parts)

    def _fill_masks(self, parts: Sequence[Rows]) -> None:
        masks = [part.mask for part in parts for _ in range(part.subsequences)]
        if all(mask is None for mask in masks):
            self._array("qq_bias", 0)
            self._array("qq_bias_begins", 0)
            return
        begins = _offsets([0 if mask is None else mask.size for mask in masks])
        bias = self._array("qq_bias", begins[-1])
        for mask, (begin, end) in zip(masks, itertools.pairwise(begins), strict=True):
            if mask is not None:
                bias[begin:end] = mask.ravel()
        self._array("qq_bias_begins", len(begins))[:] = begins

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
