"""`dgf`: a gate per channel between feature and token (Dovetail, arXiv 2412.18934, section 3.2).

Published in the paper's layout: `W_1`, `W_2`, `W_z`, `input_layernorm`, `layers.*`.

Letters: T pairs in a call, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.fusion import RMSNorm
from dovetail.export.draft.graph_builder import GraphBuilder, Value
from dovetail.export.draft.kinds.base import DraftKind, PublishedLayout
from dovetail.export.draft.published import DraftParts, PublishedDraft

_FUSION_NAMES = {"W_1": "fusion.w1", "W_2": "fusion.w2", "W_z": "fusion.wz", "input_layernorm": "fusion.norm"}


class DynamicGatingFusion(nn.Module):
    """No biases.

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


def _is_papers(published: PublishedDraft) -> bool:
    return "W_1" in published.names


def _read_papers(published: PublishedDraft) -> DraftParts:
    config = published.config("dgf")
    published.drop_targets_own()
    weights = {
        (f"{_FUSION_NAMES[name]}.weight" if (name := key.removesuffix(".weight")) in _FUSION_NAMES else key): tensor
        for key, tensor in published.weights.items()
    }
    return DraftParts(config, weights, published.target.embedding, published.target.lm_head)


DGF = DraftKind(
    name="dgf",
    fusion=DynamicGatingFusion,
    layouts=(PublishedLayout(_is_papers, _read_papers),),
    imitates_features=True,
    unroll_from=0.6,
)
