"""A GGUF's metadata -> the config that transformers would have for the model.

What llama.cpp has in its code and not in the file is here too, each with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dovetail.export.sources.gguf_format import GgufTensor
from dovetail.export.sources.gguf_metadata import Metadata
from dovetail.runtime.errors import UserError

MODEL_TYPES: Mapping[str, str] = {
    "llama": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "granite": "granite",
    "olmo2": "olmo2",
}
"""llama.cpp's architecture -> transformers' model_type."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_CLASSES = {"gemma3_text": "Gemma3", "smollm3": "SmolLM3"}
_LOCAL_PATTERN, _LOCAL_THETA = 6, 10000.0  # of Gemma 3, in llama.cpp's code: every sixth layer sees all
_MAX_HEAD_DIM = 1 << 14  # real ones: 256; rotary tables are made of it before it is held against the tensors
_ATTENTION_CAP, _LOGITS_CAP = 50.0, 30.0  # of Gemma 2, where the file does not say
_SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}  # the 27 B ones: queries by hidden / heads, not by the head's size
_NOT_YARN = (".rope.scaling.yarn_ext_factor", ".rope.scaling.yarn_log_multiplier", ".rope.scaling.attn_factor")


def read_config(metadata: Metadata, tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """The config. Raises `UserError` where metadata is missing, contradicts itself or the tensors, and for models that
    llama.cpp's name of the architecture stands for as well but that are others (experts, embeddings).
    """
    architecture = metadata.architecture
    _refuse_others(metadata)
    hidden, heads = metadata.size(".embedding_length"), metadata.size(".attention.head_count")
    if ".attention.key_length" not in metadata and hidden % heads:
        raise metadata.wrong(".attention.key_length", "the size of a head", None)
    head_dim = metadata.size(".attention.key_length", hidden // heads, _MAX_HEAD_DIM)
    if metadata.size(".attention.value_length", head_dim) != head_dim:
        raise metadata.wrong(
            ".attention.value_length", f"key_length, {head_dim}", metadata.get(".attention.value_length")
        )
    model_type = MODEL_TYPES[architecture]
    window = metadata.get(".attention.sliding_window") or 0
    if window:
        window = metadata.size(".attention.sliding_window")
    if architecture == "llama" and window:
        model_type = "mistral"
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [f"{_CLASSES.get(model_type, model_type.capitalize())}ForCausalLM"],
        "vocab_size": _vocabulary(metadata, tensors),
        "hidden_size": hidden,
        "intermediate_size": metadata.size(".feed_forward_length"),
        "num_hidden_layers": metadata.size(".block_count", limit=len(tensors)),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.size(".context_length"),
        "rms_norm_eps": metadata.number(".attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "sliding_window": window or None,
        "rope_parameters": _rope(metadata, tensors, head_dim),
    }
    if "blk.0.attn_q.bias" in tensors:
        config["attention_bias"] = True
    if "blk.0.ffn_down.bias" in tensors:
        config["mlp_bias"] = True
    if architecture == "granite":
        config |= {
            "attention_multiplier": metadata.number(".attention.scale"),
            "logits_scaling": metadata.number(".logit_scale"),
            "embedding_multiplier": metadata.number(".embedding_scale", 1.0),
            "residual_multiplier": metadata.number(".residual_scale", 1.0),
        }
    if architecture in ("gemma2", "gemma3"):
        config |= _gemma(metadata, config)
    return config


def _refuse_others(metadata: Metadata) -> None:
    kind = metadata.architecture
    if metadata.get(".expert_count"):
        raise UserError(
            f"expected a model without experts, got {metadata.get('.expert_count')} of them in {metadata.path}; export "
            f"its checkpoint in safetensors"
        )
    if metadata.get(".attention.causal") is False:
        raise UserError(f"expected a model that generates text, got an embedding model in {metadata.path}")
    if kind == "olmo2" and metadata.get(".attention.sliding_window"):
        raise UserError(f"expected an OLMo 2, got an OLMo 3 in {metadata.path}; export its checkpoint in safetensors")
    if kind == "granite" and metadata.get(".rope.scaling.finetuned") is False:
        raise UserError(f"expected a Granite with positions, got one without in {metadata.path}; choose another model")


def _vocabulary(metadata: Metadata, tensors: Mapping[str, GgufTensor]) -> int:
    """The embedding's rows, which the metadata must know."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"expected the tensor token_embd.weight in {metadata.path}, got none; copy it again")
    rows = embedding.shape[0]
    if metadata.size(".vocab_size", rows) != rows:
        raise metadata.wrong(".vocab_size", f"the embedding's rows, {rows}", metadata.get(".vocab_size"))
    if len(metadata.texts("tokenizer.ggml.tokens")) != rows:
        raise metadata.wrong(
            "tokenizer.ggml.tokens", f"one a row of the embedding, {rows}", metadata.get("tokenizer.ggml.tokens")
        )
    return rows


def _gemma(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 2 and 3: which layers see a window only, and what else differs."""
    second, layers = metadata.architecture == "gemma2", config["num_hidden_layers"]
    wide = (metadata.architecture, layers) in _SCALED_BY_WIDTH
    scalar = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    special: dict[str, Any] = {"query_pre_attn_scalar": scalar}
    cap = metadata.number(".final_logit_softcapping", _LOGITS_CAP if second else 0.0)
    special["final_logit_softcapping"] = cap or None
    if second:
        special["attn_logit_softcapping"] = metadata.number(".attn_logit_softcapping", _ATTENTION_CAP) or None
    if not second or config["sliding_window"] is None:
        special["layer_types"] = _layer_kinds(metadata, layers, config["sliding_window"] is not None)
    if not second:
        local = {"rope_type": "default", "rope_theta": metadata.number(".rope.freq_base_swa", _LOCAL_THETA)}
        special["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return special


def _layer_kinds(metadata: Metadata, layers: int, has_windows: bool) -> list[str]:
    if not has_windows:
        return ["full_attention"] * layers
    given = metadata.get(".attention.sliding_window_pattern")
    if isinstance(given, np.ndarray):
        local = [bool(flag) for flag in metadata.numbers(".attention.sliding_window_pattern", layers)]
    else:
        pattern = metadata.size(".attention.sliding_window_pattern", _LOCAL_PATTERN)
        local = [(i + 1) % pattern != 0 for i in range(layers)]
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


def _rope(metadata: Metadata, tensors: Mapping[str, GgufTensor], head_dim: int) -> dict[str, Any]:
    """Rotary parameters as transformers names them, and the kind `factors` for what Llama 3's files have: each
    frequency's divisor, computed from parameters that the file lacks.
    """
    size = metadata.size(".rope.dimension_count", head_dim)
    if size > head_dim or size % 2:
        raise metadata.wrong(".rope.dimension_count", f"an even number up to {head_dim}", size)
    theta = metadata.number(".rope.freq_base", 10000.0)
    if theta <= 0:
        raise metadata.wrong(".rope.freq_base", "a positive number", theta)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if size != head_dim:
        share = size / head_dim
        rope["partial_rotary_factor"] = share if int(head_dim * share) == size else math.nextafter(share, 1)
    kind = metadata.text(".rope.scaling.type", "linear")
    factors = {name: _factors(metadata, tensors, name, size // 2) for name in ROPE_TENSORS if name in tensors}
    factor = metadata.number(".rope.scaling.factor", metadata.number(".rope.scale_linear", 0.0))
    scaled: dict[str, Any] = {}
    if "rope_freqs.weight" in factors:
        if len(factors) > 1 or kind not in ("linear", "none") or factor not in (0.0, 1.0):
            raise metadata.wrong(".rope.scaling.type", "none beside the tensor rope_freqs.weight", kind)
        scaled = {"rope_type": "factors", "factors": factors["rope_freqs.weight"]}
    elif factors:
        scaled = _longrope(metadata, factors)
    elif kind == "longrope":
        raise metadata.wrong(".rope.scaling.type", "longrope with the tensors of its factors", kind)
    elif kind == "yarn":
        scaled = _yarn(metadata, factor)
    elif kind == "linear" and factor not in (0.0, 1.0):
        scaled = {"rope_type": "linear", "factor": factor}
    elif kind not in ("linear", "none"):
        raise metadata.wrong(".rope.scaling.type", "none, linear, yarn or longrope", kind)
    return rope | scaled


def _factors(metadata: Metadata, tensors: Mapping[str, GgufTensor], name: str, count: int) -> list[float]:
    tensor = tensors[name]
    values = tensor.to_float(tensor.raw).reshape(-1) if math.prod(tensor.shape) == count else np.zeros(0, np.float32)
    if not len(values) or not np.isfinite(values).all() or (values <= 0).any():
        raise UserError(
            f"expected {count} positive factors in the tensor {name} of {metadata.path}, got shape "
            f"{list(tensor.shape)}, or others; copy it again"
        )
    return [float(value) for value in values]


def _longrope(metadata: Metadata, factors: Mapping[str, list[float]]) -> dict[str, Any]:
    if len(factors) != 2:
        raise UserError(
            f"expected two tensors of rope factors in {metadata.path}, got {sorted(factors)}; copy it again"
        )
    rope = {
        "rope_type": "longrope",
        "short_factor": factors["rope_factors_short.weight"],
        "long_factor": factors["rope_factors_long.weight"],
        "original_max_position_embeddings": metadata.size(".rope.scaling.original_context_length"),
    }
    if ".rope.scaling.attn_factor" in metadata:
        rope["attention_factor"] = metadata.number(".rope.scaling.attn_factor")
    return rope


def _yarn(metadata: Metadata, factor: float) -> dict[str, Any]:
    for name, neutral in zip(_NOT_YARN, (1.0, 0.0, 1.0), strict=True):
        if metadata.number(name, neutral) != neutral:
            raise metadata.wrong(name, f"{neutral} or none beside yarn", metadata.get(name))
    if factor <= 0:
        raise metadata.wrong(".rope.scaling.factor", "a positive number", factor)
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.size(".rope.scaling.original_context_length"),
    }
    for key, name in (("attention_factor", "yarn_attn_factor"), ("beta_fast", "yarn_beta_fast")):
        if f".rope.scaling.{name}" in metadata:
            rope[key] = metadata.number(f".rope.scaling.{name}")
    if ".rope.scaling.yarn_beta_slow" in metadata:
        rope["beta_slow"] = metadata.number(".rope.scaling.yarn_beta_slow")
    return rope
