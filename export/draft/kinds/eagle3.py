"""`eagle3`: features from three of the target's layers, an LM head of its own (EAGLE-3, arXiv 2503.01840, section 3.1).

Published as the official one and SpecForge's (`fc` over three layers, `midlayer.*`), and as speculators' (`layers.0.*`
with `hidden_norm`, sizes in `transformer_layer_config`).

Letters: T pairs in a call, D hidden size, V the target's vocabulary, N tokens of the draft's LM head.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.graph_builder import GraphBuilder, Value
from dovetail.export.draft.kinds.base import DraftKind, PublishedLayout
from dovetail.export.draft.published import PublishedDraft, check_tokens, unexpected_shape, with_our_names
from dovetail.export.draft.weights import DraftWeights
from dovetail.export.sources.tensors import Matrix
from dovetail.runtime.errors import UserError

_NAMES = {
    "fc": "projection",
    "norm": "output_norm",
    "layers.0.hidden_norm": "fusion.feature_norm",
    "layers.0.input_layernorm": "fusion.token_norm",
}
_FOREIGN_FLAGS = ("fc_norm", "norm_before_fc", "norm_output")  # of speculators'


def _shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    return {"token_norm.weight": (config.hidden_size,), "feature_norm.weight": (config.hidden_size,)}


def _write(graph: GraphBuilder, draft: DraftWeights, features: Value | None, embeddings: Value) -> tuple[Value, Value]:
    """The stream is h, the first block's attention reads [RMSNorm(e); RMSNorm(h)], as published checkpoints compute it;
    some of them take the normed h for the stream.
    """
    assert features is not None, "a draft without features"
    weights, config = draft.part("fusion."), draft.config
    h = graph.rms_norm(features, weights["feature_norm.weight"], config.rms_norm_eps)
    e = graph.rms_norm(embeddings, weights["token_norm.weight"], config.rms_norm_eps)
    return h if config.norm_before_residual else features, graph.op("Concat", e, h, axis=-1)


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """The target's layers whose inputs EAGLE-3 reads where its config says nothing (arXiv 2503.01840, section 3.1: low,
    middle, high; the numbers are the published code's). Small targets have none to spare: spread evenly.
    """
    if num_layers >= 7:
        return 2, num_layers // 2, num_layers - 3
    return min(1, num_layers - 1), num_layers // 2, num_layers - 1


def is_eagle3(published: PublishedDraft) -> bool:
    """Whether this is one of the two layouts."""
    first_block = any(name.startswith("midlayer.") or name.endswith(".hidden_norm") for name in published.names)
    return first_block and "fc.weight" in published.tensors


def _read_eagle3(published: PublishedDraft) -> DraftWeights:
    path, document, tensors = published.path, published.document, published.tensors
    flags = [flag for flag in _FOREIGN_FLAGS if document.get(flag)] if "transformer_layer_config" in document else []
    foreign = [name for name in tensors if name.startswith(("fc_norm", "input_norm"))] + flags
    if foreign:
        raise UserError(
            f"expected an EAGLE-3 draft as in its paper, got one with {foreign[0]} in {path}, which is not "
            f"supported; choose another draft"
        )
    config = published.config(
        "eagle3",
        feature_layers=_feature_layers(published),
        norm_before_residual=bool(document.get("norm_before_residual", False)),
    )
    embedding = tensors.pop("embed_tokens.weight", published.target.embedding)
    published.check_embedding(embedding)
    lm_head, head_tokens = _reduced_head(published)
    first_named = {name.replace("midlayer.", "layers.0.", 1): tensor for name, tensor in tensors.items()}
    return DraftWeights(config, with_our_names(first_named, _NAMES), embedding, lm_head, head_tokens)


def _feature_layers(published: PublishedDraft) -> tuple[int, ...]:
    """The layers whose inputs are read. speculators' config numbers inputs, SpecForge's outputs; without numbers they
    are the published code's.
    """
    document, num_layers = published.document, published.target.num_layers
    layers = document.get("eagle_aux_hidden_state_layer_ids")
    first = 0
    if layers is None and isinstance(document.get("eagle_config"), dict):
        layers, first = document["eagle_config"].get("eagle_aux_hidden_state_layer_ids"), 1
    if layers is None:
        return default_feature_layers(num_layers)
    whole = isinstance(layers, list) and layers and all(type(layer) is int for layer in layers)
    inputs = tuple(layer + first for layer in layers) if whole else ()
    if not inputs or not all(0 <= layer < num_layers for layer in inputs):
        raise UserError(
            f"expected layers from 0 to {num_layers - 1} of the target for the draft's features, got {layers!r:.80} in "
            f"{published.path}/config.json; choose a draft made for this target"
        )
    return inputs


def _reduced_head(published: PublishedDraft) -> tuple[Matrix, NDArray[np.int64] | None]:
    """(LM head, the target's tokens of its rows or None for all); taken out of the tensors."""
    target, path = published.target, published.path
    lm_head = published.tensors.pop("lm_head.weight", target.lm_head)
    offsets = published.tensors.pop("d2t", None)  # of the token in the target's vocabulary from the row's number
    if lm_head.shape == target.lm_head.shape:
        return lm_head, None
    if offsets is None or lm_head.shape[1:] != target.lm_head.shape[1:]:
        raise unexpected_shape("lm_head.weight", lm_head.shape, target.lm_head.shape, path)
    if offsets.shape != lm_head.shape[:1]:
        raise unexpected_shape("d2t", offsets.shape, lm_head.shape[:1], path)
    tokens = np.arange(len(offsets)) + offsets.astype(np.int64)
    check_tokens(tokens, len(target.embedding), path)
    return lm_head, tokens


EAGLE3 = DraftKind(
    name="eagle3",
    fusion_shapes=_shapes,
    write_fusion=_write,
    layouts=(PublishedLayout(is_eagle3, _read_eagle3),),
    default_feature_layers=default_feature_layers,
    first_block_reads_pair=True,
    output_norm=True,
    own_head=True,
    unroll_from=0.0,  # features that nothing ties to the target's must be usable from the start (training-time test)
)
