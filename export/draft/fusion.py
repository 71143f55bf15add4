"""The first stage of each kind of draft: what becomes of the target's feature h and the token's embedding e before the
first block. Each is a torch module that also writes itself as a graph.

A stage gives what the first block adds to (its residual stream), and what its attention reads, None where that is the
stream itself.

Letters: T pairs in a call, D hidden size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dovetail.export.draft.config import DraftConfig
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


class DynamicGatingFusion(nn.Module):
    """`dgf`: a gate per channel between feature and token (Dovetail, arXiv 2412.18934, section 3.2). No biases.

    h1 = h W1;  h2 = SiLU(RMSNorm(e) W2);  z = sigmoid([h1; h2] Wz);  x = z * h1 + (1 - z) * h2
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.w1 = nn.Linear(size, size, bias=False)
        self.w2 = nn.Linear(size, size, bias=False)
        self.wz = nn.Linear(2 * size, size, bias=False)

    def forward(self, features: Tensor, embeddings: Tensor) -> tuple[Tensor, None]:
        h1 = self.w1(features)
        h2 = functional.silu(self.w2(self.norm(embeddings)))
        z = torch.sigmoid(self.wz(torch.cat([h1, h2], dim=-1)))
        return z * h1 + (1 - z) * h2, None

    def write(self, graph: GraphBuilder, features: Value, embeddings: Value) -> tuple[Value, None]:
        """The same as a graph."""
        h1 = graph.linear(features, self.w1.weight)
        h2 = graph.silu(graph.linear(self.norm.write(graph, embeddings), self.w2.weight))
        z = graph.op("Sigmoid", graph.linear(graph.op("Concat", h1, h2, axis=-1), self.wz.weight))
        return graph.op("Add", h2, graph.op("Mul", z, graph.op("Sub", h1, h2))), None  # z h1 + (1 - z) h2


class ConcatFusion(nn.Module):
    """`eagle`: x = [e; h] W + b (EAGLE, arXiv 2401.15077, section 4.1)."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fusion_bias)

    def forward(self, features: Tensor, embeddings: Tensor) -> tuple[Tensor, None]:
        return self.fc(torch.cat([embeddings, features], dim=-1)), None

    def write(self, graph: GraphBuilder, features: Value, embeddings: Value) -> tuple[Value, None]:
        """The same as a graph."""
        return graph.linear(graph.op("Concat", embeddings, features, axis=-1), self.fc.weight, bias=self.fc.bias), None


class NormedPair(nn.Module):
    """`eagle3`: the stream is h, the first block's attention reads [RMSNorm(e); RMSNorm(h)] (EAGLE-3, arXiv 2503.01840,
    section 3.1, as its published checkpoints compute it; some of them take the normed h for the stream).
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.token_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feature_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._normed_stream = config.norm_before_residual

    def forward(self, features: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        h = self.feature_norm(features)
        return h if self._normed_stream else features, torch.cat([self.token_norm(embeddings), h], dim=-1)

    def write(self, graph: GraphBuilder, features: Value, embeddings: Value) -> tuple[Value, Value]:
        """The same as a graph."""
        h = self.feature_norm.write(graph, features)
        read = graph.op("Concat", self.token_norm.write(graph, embeddings), h, axis=-1)
        return h if self._normed_stream else features, read


class TokensAlone(nn.Module):
    """`lm`: a language model of its own knows nothing of the target."""

    def forward(self, features: Tensor | None, embeddings: Tensor) -> tuple[Tensor, None]:
        return embeddings, None

    def write(self, graph: GraphBuilder, features: Value | None, embeddings: Value) -> tuple[Value, None]:
        """The same as a graph."""
        return embeddings, None


def fusion_for(config: DraftConfig) -> nn.Module:
    """The first stage of the config's kind; it also is a `Fusion`."""
    if config.kind == "lm":
        return TokensAlone()
    return {"dgf": DynamicGatingFusion, "eagle": ConcatFusion, "eagle3": NormedPair}[config.kind](config)
