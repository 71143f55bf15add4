"""Tiny random checkpoints of every supported family, from transformers' own config classes, in the layout that real
ones have on disk: safetensors in shards, `tokenizer.json`, embeddings tied and untied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB, CONTEXT, WINDOW, HIDDEN = 512, 256, 40, 64

_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 10 for i in range(6)],
    "long_factor": [2.0 + i / 2 for i in range(6)],
    "original_max_position_embeddings": 64,  # the tests' texts cross it
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "tie_word_embeddings": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4}),
    "Llama 3": ("Llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": WINDOW}),
    "Qwen2, Qwen2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2 with sliding windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "Qwen3": ("Qwen3", {"head_dim": 32}),
    "Gemma": ("Gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "Gemma 2": ("Gemma2", _GEMMA | {"initializer_range": 0.3, "attn_logit_softcapping": None} | _TWO_KINDS),
    "Gemma 3": ("Gemma3", _GEMMA | {"initializer_range": 0.08} | _TWO_KINDS),
    "SmolLM3": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "Granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    "OLMo 2": ("Olmo2", {}),
    "Phi-3": ("Phi3", {"sliding_window": WINDOW}),
    "Phi-4 mini": (
        "Phi3",
        {
            "partial_rotary_factor": 0.75,
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": 64,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
    ),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Qwen3-MoE": ("Qwen3Moe", _EXPERTS),
    "gpt-oss": ("GptOss", {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4} | _TWO_KINDS),
}
"""Family -> the name of its classes in transformers, and what makes it different from the others."""

REFUSED: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "Mamba": (
        "Mamba",
        {"state_size": 8, "time_step_rank": 4, "max_position_embeddings": None},
        "expected a transformer with attention over a context",
    ),
    "Gemma 2 with a cap on its attention's logits (all published ones)": (
        "Gemma2",
        _GEMMA | {"attn_logit_softcapping": 50.0} | _TWO_KINDS,
        "expected attention without a cap on its logits, got attn_logit_softcapping 50.0",
    ),
    "gpt-oss in MXFP4 (all published ones)": (
        "GptOss",
        {"num_local_experts": 4, "quantization_config": {"quant_method": "mxfp4"}},
        "expected weights in floating point, got a checkpoint quantised by mxfp4",
    ),
}
"""Family -> its classes, what makes it different, and what the refusal says."""

PUBLISHED: Mapping[str, str] = {
    "Gemma 2": "without the cap on its attention's logits that all published ones have: **those are refused**",
    "gpt-oss": "unquantised; all published ones are MXFP4: **those are refused**",
}
"""Family -> what the row of the table says of its published checkpoints, where those are refused (see `REFUSED`)."""

WINDOWED = {name for name, (_, special) in FAMILIES.items() if special.get("sliding_window")}


def family_config(model: str, special: Mapping[str, Any]) -> Any:
    """The config of transformers' class `model`ForCausalLM."""
    import transformers

    name = {"Gemma3": "Gemma3TextConfig"}.get(model, f"{model}Config")
    return getattr(transformers, name)(**_SIZES | special)


def write_family(folder: Path, tokenizer: Path, model: str, special: Mapping[str, Any], seed: int = 0) -> Path:
    """A checkpoint of transformers' class `model`ForCausalLM, with the `tokenizer.json` at `tokenizer`."""
    import torch
    import transformers

    from dovetail.export.quiet import quiet_torch

    with quiet_torch():
        config = family_config(model, special)
        torch.manual_seed(seed)
        made = getattr(transformers, f"{model}ForCausalLM")(config)
        with torch.no_grad():
            for weight in made.parameters():
                if weight.ndim == 1:  # norms and biases, which begin as ones and zeros
                    weight.add_(torch.randn_like(weight) / 10)
            if config.tie_word_embeddings:  # else the likeliest token is mostly the last one
                made.get_input_embeddings().weight.mul_(0.06)
        made.save_pretrained(folder, max_shard_size="200KB")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
