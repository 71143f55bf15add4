"""`lm`: a small causal language model with the target's tokenizer.

Published in Hugging Face's layout, of the families Llama, Mistral, Qwen 2 or 3: architectures ...ForCausalLM, `lm_head`
or tied.

Letters: T pairs in a call, D hidden size.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.graph_builder import GraphBuilder, Value
from dovetail.export.draft.kinds.base import DraftKind, PublishedLayout
from dovetail.export.draft.published import FAMILIES, DraftParts, PublishedDraft
from dovetail.runtime.errors import UserError


class TokensAlone(nn.Module):
    """A language model of its own knows nothing of the target."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()

    def forward(self, features: Tensor | None, embeddings: Tensor) -> tuple[Tensor, None]:
        return embeddings, None

    def write(self, graph: GraphBuilder, features: Value | None, embeddings: Value) -> tuple[Value, None]:
        """The same as a graph."""
        return embeddings, None


def _is_language_model(published: PublishedDraft) -> bool:
    architectures = published.document.get("architectures") or []
    return any(str(name).endswith("ForCausalLM") for name in architectures) and "embed_tokens" in published.names


def _read_language_model(published: PublishedDraft) -> DraftParts:
    folder, document, tensors = published.folder, published.document, published.weights
    family = document.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"expected a draft of the families {', '.join(FAMILIES)}, got {family!r} in {folder}; choose another one"
        )
    if document.get("sliding_window") and document.get("use_sliding_window", True):
        raise UserError(
            f"expected a draft that attends to the whole context, got a sliding window of {document['sliding_window']} "
            f"in {folder}; choose another one"
        )
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"expected tokenizer.json beside the draft, to compare with the target's, got {folder} without it; save "
            f"the fast tokenizer there"
        )
    vocab_size = len(published.target.embedding)
    config = dataclasses.replace(published.own_config("lm"), vocab_size=vocab_size)
    embedding = tensors.pop("embed_tokens.weight").float()
    lm_head = tensors.pop("lm_head.weight", embedding).float()
    rows = min(len(embedding), vocab_size)  # the same tokens, padded to other sizes
    head_tokens = None if len(lm_head) == vocab_size else torch.arange(rows)
    padded = torch.nn.functional.pad(embedding[:rows], (0, 0, 0, vocab_size - rows))
    weights = {f"output_{key}" if key.startswith("norm.") else key: tensor for key, tensor in tensors.items()}
    return DraftParts(config, weights, padded, lm_head[:rows], head_tokens)


LANGUAGE_MODEL = DraftKind(
    name="lm",
    fusion=TokensAlone,
    layouts=(PublishedLayout(_is_language_model, _read_language_model),),
    reads_features=False,
    first_block_norm=True,
    output_norm=True,
)
