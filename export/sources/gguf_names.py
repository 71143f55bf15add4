"""What llama.cpp's converter does to a checkpoint's tensors, undone: other names, other rows, Gemma's norms.

    blk.3.attn_q.weight     model.layers.3.self_attn.q_proj.weight

Rotary embedding turns pairs of a head's entries. transformers pairs entry i with i + E/2, llama.cpp's older
architectures i with i + 1, and their files have the rows of queries and keys in that order:

    transformers    0 1 2 3 | 4 5 6 7        in the file    0 4 1 5 2 6 3 7

Letters: R rows, E size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dovetail.export.sources.gguf_format import GgufTensor
from dovetail.export.sources.tensors import StoredTensor

_OUTER = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_WITH_POST_NORMS = ("gemma2", "gemma3", "olmo2")
_INTERLEAVED = ("llama", "smollm3", "granite")
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")


def as_stored(tensor: GgufTensor, architecture: str, heads: int, kv_heads: int) -> StoredTensor | None:
    """`tensor` as transformers has it; None where it has no such tensor."""
    name = _name(tensor.name, architecture)
    if name is None:
        return None
    rows: NDArray[np.int64] | None = None
    if architecture in _INTERLEAVED and ".q_proj." in name:
        rows = _halves(tensor.shape[0], heads)
    if architecture in _INTERLEAVED and ".k_proj." in name:
        rows = _halves(tensor.shape[0], kv_heads)
    shift = -1.0 if architecture in _NORMS_PLUS_ONE and name.endswith("norm.weight") else 0.0
    return StoredTensor(name, tensor.shape, tensor.kind, tensor.raw, lambda raw, _: tensor.to_float(raw), rows, shift)


def _name(name: str, architecture: str) -> str | None:
    stem, _, end = name.rpartition(".")
    if end not in ("weight", "bias"):
        return None
    if stem == "output":
        return f"lm_head.{end}"
    if stem in _OUTER:
        return f"model.{_OUTER[stem]}.{end}"
    block, _, place = stem.removeprefix("blk.").partition(".")
    places: Mapping[str, str] = _LAYER | (_POST_NORMS if architecture in _WITH_POST_NORMS else {})
    if architecture == "phi3":
        places = dict(places) | {"ffn_up": "mlp.gate_up_proj"}  # both in one, the gate's rows first
    if not stem.startswith("blk.") or not block.isdecimal() or place not in places:
        return None
    return f"model.layers.{int(block)}.{places[place]}.{end}"


def _halves(size: int, heads: int) -> NDArray[np.int64] | None:
    """Which rows of the file [R] make each head's two halves; None where the heads don't divide it."""
    if size % (2 * heads):
        return None  # of another shape than the model's, which the check of shapes tells
    return np.arange(size).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
