"""`dgf`: a gate per channel between feature and token (Dovetail, arXiv 2412.18934, section 3.2).

Published in the paper's layout: `W_1`, `W_2`, `W_z`, `input_layernorm`, `layers.*`.

Letters: T pairs in a call, D hidden size.
"""

from __future__ import annotations

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.graph_builder import GraphBuilder, Value
from dovetail.export.draft.kinds.base import DraftKind, PublishedLayout
from dovetail.export.draft.published import PublishedDraft, with_our_names
from dovetail.export.draft.weights import DraftWeights

_FUSION_NAMES = {"W_1": "fusion.w1", "W_2": "fusion.w2", "W_z": "fusion.wz", "input_layernorm": "fusion.norm"}


def _shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    size = config.hidden_size
    square = (size, size)
    return {"norm.weight": (size,), "w1.weight": square, "w2.weight": square, "wz.weight": (size, 2 * size)}


def _write(graph: GraphBuilder, draft: DraftWeights, features: Value | None, embeddings: Value) -> tuple[Value, None]:
    """h1 = h W1;  h2 = SiLU(RMSNorm(e) W2);  z = sigmoid([h1; h2] Wz);  x = z * h1 + (1 - z) * h2.  No biases."""
    assert features is not None, "a draft without features"
    weights = draft.part("fusion.")
    h1 = graph.linear(features, weights["w1.weight"])
    normed = graph.rms_norm(embeddings, weights["norm.weight"], draft.config.rms_norm_eps)
    h2 = graph.silu(graph.linear(normed, weights["w2.weight"]))
    z = graph.op("Sigmoid", graph.linear(graph.op("Concat", h1, h2, axis=-1), weights["wz.weight"]))
    return graph.op("Add", h2, graph.op("Mul", z, graph.op("Sub", h1, h2))), None  # z h1 + (1 - z) h2


def _is_papers(published: PublishedDraft) -> bool:
    return "W_1" in published.names


def _read_papers(published: PublishedDraft) -> DraftWeights:
    config = published.config("dgf")
    published.drop_targets_own()
    target, tensors = published.target, with_our_names(published.tensors, _FUSION_NAMES)
    return DraftWeights(config, tensors, target.embedding, target.lm_head)


DGF = DraftKind(
    name="dgf",
    fusion_shapes=_shapes,
    write_fusion=_write,
    layouts=(PublishedLayout(_is_papers, _read_papers),),
    imitates_features=True,
    unroll_from=0.6,
)
