"""`eagle`: feature and token side by side through one matrix (EAGLE, arXiv 2401.15077, section 4.1).

Published as EAGLE-1 and 2: `fc` over [e; h], with or without bias, `layers.*`.

Letters: T pairs in a call, D hidden size.
"""

from __future__ import annotations

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.graph_builder import GraphBuilder, Value
from dovetail.export.draft.kinds.base import DraftKind, PublishedLayout
from dovetail.export.draft.kinds.eagle3 import is_eagle3
from dovetail.export.draft.published import PublishedDraft, with_our_names
from dovetail.export.draft.weights import DraftWeights


def _shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    size = config.hidden_size
    return {"fc.weight": (size, 2 * size)} | ({"fc.bias": (size,)} if config.fusion_bias else {})


def _write(graph: GraphBuilder, draft: DraftWeights, features: Value | None, embeddings: Value) -> tuple[Value, None]:
    """x = [e; h] W + b."""
    assert features is not None, "a draft without features"
    weights = draft.part("fusion.")
    pair = graph.op("Concat", embeddings, features, axis=-1)
    return graph.linear(pair, weights["fc.weight"], bias=weights.get("fc.bias")), None


def _is_eagle(published: PublishedDraft) -> bool:
    has_both = "fc.weight" in published.tensors and "layers.0.mlp.gate_proj" in published.names
    return has_both and not is_eagle3(published)


def _read_eagle(published: PublishedDraft) -> DraftWeights:
    config = published.config("eagle", fusion_bias="fc.bias" in published.tensors)
    published.drop_targets_own()
    target, tensors = published.target, with_our_names(published.tensors, {"fc": "fusion.fc"})
    return DraftWeights(config, tensors, target.embedding, target.lm_head)


EAGLE = DraftKind(
    name="eagle",
    fusion_shapes=_shapes,
    write_fusion=_write,
    layouts=(PublishedLayout(_is_eagle, _read_eagle),),
    imitates_features=True,
    unroll_from=0.6,
)
