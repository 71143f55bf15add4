"""`eagle3`: features from three of the target's layers, an LM head of its own (EAGLE-3, arXiv 2503.01840, section 3.1).

Published as the official one and SpecForge's (`fc` over three layers, `midlayer.*`), and as speculators' (`layers.0.*`
with `hidden_norm`, sizes in `transformer_layer_config`).

Letters: T pairs in a call, D hidden size, V the target's vocabulary, N tokens of the draft's LM head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.fusion import RMSNorm
from dovetail.export.draft.graph_builder import GraphBuilder, Value
from dovetail.export.draft.kinds.base import DraftKind, PublishedLayout
from dovetail.export.draft.published import DraftParts, PublishedDraft, Weights, check_tokens, unexpected_shape
from dovetail.runtime.errors import UserError

_FIRST_BLOCK_NAMES = {"hidden_norm": "fusion.feature_norm", "input_layernorm": "fusion.token_norm"}
_FOREIGN_FLAGS = ("fc_norm", "norm_before_fc", "norm_output")  # of speculators'


class NormedPair(nn.Module):
    """The stream is h, the first block's attention reads [RMSNorm(e); RMSNorm(h)], as published checkpoints compute it;
    some of them take the normed h for the stream.
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
    return first_block and "fc.weight" in published.weights


def _read_eagle3(published: PublishedDraft) -> DraftParts:
    folder, document, tensors = published.folder, published.document, published.weights
    flags = [flag for flag in _FOREIGN_FLAGS if document.get(flag)] if "transformer_layer_config" in document else []
    foreign = [name for name in tensors if name.startswith(("fc_norm", "input_norm"))] + flags
    if foreign:
        raise UserError(
            f"expected an EAGLE-3 draft as in its paper, got one with {foreign[0]} in {folder}, which is not "
            f"supported; choose another draft"
        )
    config = published.config(
        "eagle3",
        feature_layers=_feature_layers(published),
        norm_before_residual=bool(document.get("norm_before_residual", False)),
    )
    embedding = tensors.pop("embed_tokens.weight", published.target.embedding).float()
    published.check_embedding(embedding)
    lm_head, head_tokens = _reduced_head(published)
    weights: Weights = {}
    for key, tensor in tensors.items():
        name, _, end = key.replace("midlayer.", "layers.0.", 1).rpartition(".")
        inner = name.removeprefix("layers.0.")
        if name != inner and inner in _FIRST_BLOCK_NAMES:
            name = _FIRST_BLOCK_NAMES[inner]
        weights[f"{ {'fc': 'projection', 'norm': 'output_norm'}.get(name, name) }.{end}"] = tensor
    return DraftParts(config, weights, embedding, lm_head.float(), head_tokens)


def _feature_layers(published: PublishedDraft) -> tuple[int, ...]:
    """The layers whose inputs are read. speculators' config numbers inputs, SpecForge's outputs; without numbers they
    are the published code's.
    """
    document, num_layers = published.document, published.target.config.num_hidden_layers
    layers = document.get("eagle_aux_hidden_state_layer_ids")
    if layers is None:
        outputs = (document.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        layers = default_feature_layers(num_layers) if outputs is None else [layer + 1 for layer in outputs]
    if not all(type(layer) is int and 0 <= layer < num_layers for layer in layers):
        raise UserError(
            f"expected layers from 0 to {num_layers - 1} of the target for the draft's features, got {list(layers)} in "
            f"{published.folder}/config.json; choose a draft made for this target"
        )
    return tuple(layers)


def _reduced_head(published: PublishedDraft) -> tuple[Tensor, Tensor | None]:
    """(LM head, the target's tokens of its rows or None for all); taken out of the weights."""
    target, folder = published.target, published.folder
    lm_head = published.weights.pop("lm_head.weight", target.lm_head)
    offsets = published.weights.pop("d2t", None)  # of the token in the target's vocabulary from the row's number
    if len(lm_head) == len(target.embedding):
        return lm_head, None
    if offsets is None:
        raise unexpected_shape("lm_head.weight", lm_head.shape, target.lm_head.shape, folder)
    if offsets.shape != lm_head.shape[:1]:
        raise unexpected_shape("d2t", offsets.shape, lm_head.shape[:1], folder)
    tokens = torch.arange(len(offsets)) + offsets.long()
    check_tokens(tokens, len(target.embedding), folder)
    return lm_head, tokens


EAGLE3 = DraftKind(
    name="eagle3",
    fusion=NormedPair,
    layouts=(PublishedLayout(is_eagle3, _read_eagle3),),
    default_feature_layers=default_feature_layers,
    first_block_reads_pair=True,
    output_norm=True,
    own_head=True,
    unroll_from=0.0,  # features that nothing ties to the target's must be usable from the start (training-time test)
)
