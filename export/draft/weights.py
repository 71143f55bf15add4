"""A draft as arrays: what a folder is read to, and what its graph is written from.

Letters: V vocabulary, N tokens of the LM head, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.export.draft.config import DraftConfig, check_fits
from dovetail.export.sources.tensors import Matrix

Tensors = Mapping[str, Matrix]


@dataclasses.dataclass(frozen=True, slots=True)
class DraftWeights:
    """`tensors` are the trained part, float32, by the names that `weight_shapes` lists. Beside it the embedding and the
    LM head: the target's, but for a kind that has its own.

    `lm_head` has rows for `head_tokens` alone, in their order; None: for the whole vocabulary. Raises `UserError` where
    the embedding is not of the config's sizes.
    """

    config: DraftConfig
    tensors: Tensors
    embedding: Matrix  # [V, D]
    lm_head: Matrix  # [V, D], or [N, D]
    head_tokens: NDArray[np.int64] | None = None  # [N]

    def __post_init__(self) -> None:
        check_fits(self.config, *self.embedding.shape)
        rows = self.config.vocab_size if self.head_tokens is None else len(self.head_tokens)
        assert self.lm_head.shape == (rows, self.config.hidden_size), f"an LM head of {self.lm_head.shape}"
        assert self.config.head_size in (None, rows), "the config says another size of the head"

    def part(self, prefix: str) -> Tensors:
        """The tensors whose names begin with `prefix`, without it: `blocks.0.`."""
        return {name.removeprefix(prefix): array for name, array in self.tensors.items() if name.startswith(prefix)}

    def with_head_of(self, tokens: NDArray[Any]) -> DraftWeights:
        """The same draft with rows of the LM head for `tokens` alone, those of them that it has; its distributions are
        over them.
        """
        had = np.arange(len(self.lm_head)) if self.head_tokens is None else self.head_tokens
        mask = np.isin(had, tokens)
        size = None if self.config.head_size is None else int(mask.sum())
        config = dataclasses.replace(self.config, head_size=size)
        return dataclasses.replace(self, config=config, lm_head=self.lm_head[mask], head_tokens=had[mask])
