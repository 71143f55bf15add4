"""GGUF files of tiny models, written as llama.cpp's converter writes them, with the `gguf` package's own writer and its
table of names: nothing in here comes from the code that reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from models import families
from numpy.typing import NDArray
from safetensors.numpy import load_file

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # others have transformers' name
_PERMUTED = ("llama", "smollm3", "granite")
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    name: families.FAMILIES[name]
    for name in ("Llama 2", "Llama 3", "Mistral", "Qwen2, Qwen2.5", "Qwen3", "Gemma", "Gemma 2", "Gemma 3", "Phi-3")
} | {
    "Phi-4 mini": families.FAMILIES["Phi-4 mini"],
    "SmolLM3": ("SmolLM3", {"num_hidden_layers": 4}),
    "Granite": ("Granite", {"attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
    "OLMo2": ("Olmo2", {}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "Qwen3 with yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": _YARN}),
    "Gemma 3 scaled": (
        "Gemma3",
        families.FAMILIES["Gemma 3"][1]
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
}
"""Family -> the name of its classes in transformers, and what makes it different from the others."""

_SCALES = {
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
}


def write_gguf(path: Path, values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Path:
    """A file of these values and tensors; bytes [R, bytes a row] are Q8_0, everything else is as it is."""
    writer = gguf.GGUFWriter(path, values["general.architecture"])
    for name, value in values.items():
        if name == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            (writer.add_uint32 if value >= 0 else writer.add_int32)(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.dtype == np.uint8 else None
        writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(checkpoint: Path, quantise: bool = False) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Values and tensors of the checkpoint in a folder. `quantise`: matrices become Q8_0."""
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    values = {"general.architecture": architecture, "general.type": "model", "general.name": "tiny"}
    values |= {f"{architecture}.{name}": value for name, value in _metadata(config, architecture).items()}
    values |= _vocabulary(checkpoint, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    weights = {name: w for path in sorted(checkpoint.glob("*.safetensors")) for name, w in load_file(path).items()}
    tensors: dict[str, NDArray[Any]] = {}
    for name, weight in weights.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs, name
        converted = _converted(name, weight, architecture, config)
        if quantise and converted.ndim == 2:
            converted = gguf.quants.quantize(converted, gguf.GGMLQuantizationType.Q8_0)
        tensors[theirs] = converted
    return values, tensors | _rope_tensors(config)


def _converted(name: str, weight: NDArray[Any], architecture: str, config: Mapping[str, Any]) -> NDArray[Any]:
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads and architecture in _PERMUTED:
        split = weight.reshape(config[heads], 2, -1, *weight.shape[1:])
        weight = np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        weight = weight + np.float32(1)
    return weight


def _metadata(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(full["rope_theta"]),
        "rope.dimension_count": int(head_dim * (full.get("partial_rotary_factor") or 1)),
        "vocab_size": config["vocab_size"],
    }
    if full["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": full["factor"]}
        if full["rope_type"] == "yarn":
            values["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    if full["rope_type"] == "longrope":
        original = full["original_max_position_embeddings"]
        factor = config["max_position_embeddings"] / original
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        values |= {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": scale}
    if config.get("sliding_window") and architecture != "qwen2":
        values["attention.sliding_window"] = config["sliding_window"]
    if architecture == "gemma3":
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
    if architecture == "gemma2":
        values["attn_logit_softcapping"] = float(config["attn_logit_softcapping"] or 0)
    if config.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = config["final_logit_softcapping"]
    return values | {_SCALES[name]: float(config[name]) for name in _SCALES if name in config}


def _rope_tensors(config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32) for name in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def _vocabulary(checkpoint: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), config["vocab_size"])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token == "<|endoftext|>" else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
