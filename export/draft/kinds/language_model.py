"""`lm`: a small causal language model with the target's tokenizer.

Published in Hugging Face's layout or as a GGUF file, of the families Llama (SmolLM2 is one), Mistral, Qwen 2 or 3:
architectures ...ForCausalLM, `lm_head` or tied.

Letters: T tokens in a call, D hidden size.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.graph_builder import GraphBuilder, Value
from dovetail.export.draft.kinds.base import DraftKind, PublishedLayout
from dovetail.export.draft.published import FAMILIES, PublishedDraft, unexpected_shape, with_our_names
from dovetail.export.draft.weights import DraftWeights
from dovetail.runtime.errors import UserError


def _shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    return {}


def _write(graph: GraphBuilder, draft: DraftWeights, features: Value | None, embeddings: Value) -> tuple[Value, None]:
    """A language model of its own knows nothing of the target."""
    return embeddings, None


def _is_language_model(published: PublishedDraft) -> bool:
    """Where no architecture is named, as in a GGUF, `model_type` decides."""
    named = published.document.get("architectures") or "ForCausalLM"
    architectures = named if isinstance(named, list) else [named]
    return any(str(name).endswith("ForCausalLM") for name in architectures) and "embed_tokens" in published.names


def _read_language_model(published: PublishedDraft) -> DraftWeights:
    path, tensors = published.path, published.tensors
    family = published.document.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"expected a draft of the families {', '.join(FAMILIES)}, got {family!r} in {path}; choose another one"
        )
    decoder = published.decoder()
    window = next((layer.window for layer in decoder.layers if layer.window is not None), None)
    if window is not None:
        raise UserError(
            f"expected a draft that attends to the whole context, got a sliding window of {window} in {path}; choose "
            f"another one"
        )
    if not published.source.tokenizer:
        raise UserError(
            f"expected tokenizer.json beside the draft, to compare with the target's, got {path} without it; save "
            f"the fast tokenizer there"
        )
    if decoder.num_layers != published.num_blocks:
        raise UserError(
            f"expected the {decoder.num_layers} layers of the config, got {published.num_blocks} in {path}; copy the "
            f"draft again"
        )
    vocab_size = len(published.target.embedding)
    config = dataclasses.replace(published.own_config("lm"), vocab_size=vocab_size)
    embedding = tensors.pop("embed_tokens.weight")
    if "lm_head.weight" not in tensors and not decoder.tied:
        raise UserError(f"expected the LM head of an untied model in {path}, got none; copy the draft again")
    lm_head = tensors.pop("lm_head.weight", embedding)
    for name, matrix in (("embed_tokens.weight", embedding), ("lm_head.weight", lm_head)):
        if matrix.shape != (decoder.vocab_size, config.hidden_size):
            raise unexpected_shape(name, matrix.shape, (decoder.vocab_size, config.hidden_size), path)
    rows = min(len(embedding), vocab_size)  # the same tokens, padded to other sizes
    head_tokens = None if len(lm_head) == vocab_size else np.arange(rows)
    padded = np.pad(embedding[:rows], ((0, vocab_size - rows), (0, 0)))
    return DraftWeights(config, with_our_names(tensors, {"norm": "output_norm"}), padded, lm_head[:rows], head_tokens)


LANGUAGE_MODEL = DraftKind(
    name="lm",
    fusion_shapes=_shapes,
    write_fusion=_write,
    layouts=(PublishedLayout(_is_language_model, _read_language_model),),
    reads_features=False,
    first_block_norm=True,
    output_norm=True,
)
