"""What the first stage of a draft is: it makes the input of the first block from the target's feature h and the token's
embedding e. Each kind of draft has its own (`kinds/`): a torch module that also writes itself as a graph.

A stage gives what the first block adds to (its residual stream), and what its attention reads, None where that is the
stream itself.

Letters: T pairs in a call, D hidden size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dovetail.export.draft.graph_builder import GraphBuilder, Value


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever comes in."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide: Tensor = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return wide.to(x.dtype) * self.weight

    def write(self, graph: GraphBuilder, x: Value) -> Value:
        """The same as a graph."""
        return graph.rms_norm(x, self.weight, self._eps)


class Fusion(Protocol):
    """A first stage: from features and embeddings [..., T, D] to (stream, what attention reads or None)."""

    def __call__(self, features: Tensor | None, embeddings: Tensor) -> tuple[Tensor, Tensor | None]: ...
    def write(self, graph: GraphBuilder, features: Value | None, embeddings: Value) -> tuple[Value, Value | None]: ...
