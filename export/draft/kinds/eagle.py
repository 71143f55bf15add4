"""`eagle`: feature and token side by side through one matrix (EAGLE, arXiv 2401.15077, section 4.1).

Published as EAGLE-1 and 2: `fc` over [e; h], with or without bias, `layers.*`.

Letters: T pairs in a call, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.graph_builder import GraphBuilder, Value
from dovetail.export.draft.kinds.base import DraftKind, PublishedLayout
from dovetail.export.draft.kinds.eagle3 import is_eagle3
from dovetail.export.draft.published import DraftParts, PublishedDraft


class ConcatFusion(nn.Module):
    """x = [e; h] W + b."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fusion_bias)

    def forward(self, features: Tensor, embeddings: Tensor) -> tuple[Tensor, None]:
        return self.fc(torch.cat([embeddings, features], dim=-1)), None

    def write(self, graph: GraphBuilder, features: Value, embeddings: Value) -> tuple[Value, None]:
        """The same as a graph."""
        return graph.linear(graph.op("Concat", embeddings, features, axis=-1), self.fc.weight, bias=self.fc.bias), None


def _is_eagle(published: PublishedDraft) -> bool:
    has_both = "fc.weight" in published.weights and "layers.0.mlp.gate_proj" in published.names
    return has_both and not is_eagle3(published)


def _read_eagle(published: PublishedDraft) -> DraftParts:
    config = published.config("eagle", fusion_bias="fc.bias" in published.weights)
    published.drop_targets_own()
    weights = {
        key.replace("fc.", "fusion.fc.", 1) if key.startswith("fc.") else key: tensor
        for key, tensor in published.weights.items()
    }
    return DraftParts(config, weights, published.target.embedding, published.target.lm_head)


EAGLE = DraftKind(
    name="eagle",
    fusion=ConcatFusion,
    layouts=(PublishedLayout(_is_eagle, _read_eagle),),
    imitates_features=True,
    unroll_from=0.6,
)
