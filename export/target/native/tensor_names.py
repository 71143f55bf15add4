"""Which tensors a decoder is made of: their names in transformers' checkpoints, and their shapes [out, in]."""

from __future__ import annotations

import numpy as np

from dovetail.export.sources.base import Source
from dovetail.export.target.native.decoder import Decoder
from dovetail.runtime.errors import UserError

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
PROJECTION = "draft.projection.weight"  # no tensor of the target: what a draft makes a feature with

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(decoder: Decoder) -> Shapes:
    """The shape of each tensor that `decoder` needs, by name, in the order of the computation."""
    shapes: Shapes = {EMBEDDING: (decoder.vocab_size, decoder.hidden_size)}
    layer = layer_shapes(decoder)
    for index in range(decoder.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes[FINAL_NORM] = (decoder.hidden_size,)
    if not decoder.tied:
        shapes[HEAD] = (decoder.vocab_size, decoder.hidden_size)
    return shapes


def layer_shapes(decoder: Decoder) -> Shapes:
    """The same of one layer, by the names behind `model.layers.N.`."""
    shapes: Shapes = {}
    for name, (rows, inputs, bias) in _matrices(decoder).items():
        shapes[f"{name}.weight"] = (rows, inputs)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    norms = ["input_layernorm"] if decoder.pre_norms else []
    norms += ["post_attention_layernorm"]  # with post norms behind the attention, else before the feed-forward part
    if decoder.post_norms:
        norms += ["pre_feedforward_layernorm"] if decoder.pre_norms else []
        norms += ["post_feedforward_layernorm"]
    shapes |= {f"{norm}.weight": (decoder.hidden_size,) for norm in norms}
    if decoder.head_norms != "none":
        each = decoder.head_norms == "each"
        for name, heads in (("q_norm", decoder.num_heads), ("k_norm", decoder.num_kv_heads)):
            shapes[f"self_attn.{name}.weight"] = (decoder.head_dim * (1 if each else heads),)
    return shapes


def check_tensors(source: Source, decoder: Decoder) -> None:
    """Raise `UserError` unless `source` has the tensors that `decoder` needs, of their shapes, and no others.

    What transformers leaves aside as well may be there: rotary tables of old checkpoints, and the copy of a tied
    embedding.
    """
    shapes = tensor_shapes(decoder)
    for name, shape in shapes.items():
        if name not in source.tensors:
            raise UserError(f"expected {name} of shape {list(shape)} in {source.path}, got none; copy the model again")
        if source.tensors[name].shape != shape:
            raise UserError(
                f"expected {name} of shape {list(shape)} in {source.path}, got {list(source.tensors[name].shape)}; "
                f"copy the model again"
            )
    for name in source.tensors.keys() - shapes.keys():
        if name == HEAD and decoder.tied:
            _check_copy(source)
        elif not name.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"expected only the tensors of a {decoder.family} in {source.path}, got {name}, too; choose another "
                f"model"
            )


def _check_copy(source: Source) -> None:
    head, embedding = source.tensors[HEAD], source.tensors[EMBEDDING]
    same = head.shape == embedding.shape and (
        np.array_equal(head.raw, embedding.raw) if head.kind == embedding.kind else False
    )
    if not same:
        raise UserError(
            f"expected one embedding (tie_word_embeddings) in {source.path}, got an {HEAD} of its own; set "
            f"tie_word_embeddings to false in its config"
        )


def _matrices(decoder: Decoder) -> dict[str, tuple[int, int, bool]]:
    """Name -> (outputs, inputs, whether it has a bias)."""
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    matrices: dict[str, tuple[int, int, bool]] = {}
    if decoder.joined_weights:
        matrices["self_attn.qkv_proj"] = (queries + 2 * keys, hidden, decoder.qkv_bias)
    else:
        matrices["self_attn.q_proj"] = (queries, hidden, decoder.qkv_bias)
        matrices["self_attn.k_proj"] = (keys, hidden, decoder.qkv_bias)
        matrices["self_attn.v_proj"] = (keys, hidden, decoder.qkv_bias)
    matrices["self_attn.o_proj"] = (hidden, queries, decoder.output_bias)
    if decoder.joined_weights:
        matrices["mlp.gate_up_proj"] = (2 * inner, hidden, decoder.mlp_bias)
    else:
        matrices["mlp.gate_proj"] = (inner, hidden, decoder.mlp_bias)
        matrices["mlp.up_proj"] = (inner, hidden, decoder.mlp_bias)
    matrices["mlp.down_proj"] = (hidden, inner, decoder.mlp_bias)
    return matrices
