"""A Llama checkpoint as a GGUF file, which llama.cpp runs: weights in Q8_0, the closest to the artifact's INT8, or in
F16, of which llama.cpp makes all its other formats.

Usage: python -m dovetail.export.target.gguf_writer SRC OUT.gguf [--file-type F16]
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from dovetail.export.artifact.atomic_file import replacing
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.sources.tensors import StoredTensor
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import run

_BLOCK = 32  # weights that share one scale in Q8_0
FILE_TYPES = ("Q8_0", "F16")
_PLACES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_PLACES_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    source: Path, out: Path, progress: Callable[[], object] = lambda: None, *, file_type: str = "Q8_0"
) -> None:
    """Write the checkpoint folder `source` to the file `out`, which appears whole or not at all.

    Matrices become Q8_0 (blocks of 32 weights and a float16 scale) or F16, norms float32. The vocabulary is
    carried as bytes per id, for llama.cpp to load; text is not meant to be tokenized by this file: give token ids.
    `progress` is called per tensor; one at a time is in memory. Raises `UserError` where the checkpoint is no Llama
    that llama.cpp's `llama` architecture computes, or the `gguf` package is missing.
    """
    checkpoint = read_checkpoint(source)
    config, tensors = dict(checkpoint.config), checkpoint.tensors
    rope = _checked_rope(source, config)
    try:
        import gguf
    except ImportError:
        raise UserError("expected the package gguf, got none; pip install 'dovetail[bench]'") from None
    names = _tensor_names(source, config, tensors)
    with replacing(out) as partial, contextlib.closing(gguf.GGUFWriter(partial, "llama")) as writer:
        writer.add_name(source.name)
        _add_sizes(writer, config, rope)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{file_type}"])
        _add_vocabulary(writer, source, config)
        # Sizes first, of what follows in the same order: the file begins with a table of all tensors.
        factors = _llama3_factors(rope, _head_dim(config)) if rope.get("rope_type") == "llama3" else None
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for name in names:
            shape = tensors[name].shape
            kind = _kind(len(shape), file_type)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            size = math.prod(shape) // block * block_bytes
            writer.add_tensor_info(_gguf_name(name), shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name in names:
            weight = _weight(tensors[name], config)
            writer.write_tensor_data(gguf.quants.quantize(weight, _kind(weight.ndim, file_type)))
            progress()


def _kind(ndim: int, file_type: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[file_type if ndim == 2 else "F32"]


def _kv_heads(config: dict[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_sizes(writer: Any, config: dict[str, Any], rope: dict[str, Any]) -> None:
    import gguf

    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _checked_rope(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters, after all that llama.cpp's `llama` graph would compute differently was refused."""

    def refuse(expected: str, got: object) -> None:
        raise UserError(f"expected {expected} for GGUF, got {got} in {source}; choose a Llama checkpoint")

    if config.get("model_type") != "llama":
        refuse("a model of type llama", config.get("model_type"))
    if config.get("attention_bias") or config.get("mlp_bias"):
        refuse("projections without biases", "biases")
    if config.get("hidden_act", "silu") != "silu":
        refuse("SiLU", config["hidden_act"])
    for key in ("hidden_size", "intermediate_size"):
        if config[key] % _BLOCK:
            refuse(f"{key} divisible by {_BLOCK}", config[key])
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        "rope_type": "default",
        **(config.get("rope_scaling") or {}),
    }
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        refuse("plain or llama3 rotary embeddings", rope["rope_type"])
    return dict(rope)


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> NDArray[np.float32]:
    """By what each rotary frequency is divided in Llama 3.1's scaling.  # [head_dim / 2] float32"""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    length = rope["original_max_position_embeddings"]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)  # 1: kept as it is; 0: divided by `factor`
    factors: NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection in llama.cpp's order: a rotated pair lies side by side, not half a head apart.

    `weight` [heads * head_dim, hidden].
    """
    split = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


def _add_vocabulary(writer: Any, source: Path, config: dict[str, Any]) -> None:
    """Ids to strings, enough for llama.cpp to load the model and to take and give ids."""
    import gguf
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    size = config["vocab_size"]
    pieces = [tokenizer.id_to_token(i) or f"<unused{i}>" for i in range(size)]
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    unused = {i for i, piece in enumerate(pieces) if piece == f"<unused{i}>"}
    control, normal, nothing = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_types([nothing if i in unused else control if i in special else normal for i in range(size)])
    merges = json.loads(tokenizer.to_str())["model"].get("merges") or []
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        value = config.get(key)
        if isinstance(value, list):
            value = value[0]
        if value is not None:
            add(value)
    writer.add_add_bos_token(False)


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _PLACES:
        return f"{_PLACES[stem]}.{kind}"
    _, _, block, place = stem.split(".", 3)
    return f"blk.{block}.{_PLACES_IN_BLOCK[place]}.{kind}"


def _tensor_names(source: Path, config: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The checkpoint's tensors in the order they are written. Raises `UserError` if one is missing."""
    blocks = range(config["num_hidden_layers"])
    wanted = ["model.embed_tokens.weight"]
    wanted += [f"model.layers.{block}.{place}.weight" for block in blocks for place in _PLACES_IN_BLOCK]
    wanted += ["model.norm.weight"] + ([] if config.get("tie_word_embeddings") else ["lm_head.weight"])
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise UserError(f"expected the weight {missing[0]} in {source}, got none; copy the checkpoint again")
    return wanted


def _weight(tensor: StoredTensor, config: dict[str, Any]) -> NDArray[np.float32]:
    """One tensor as llama.cpp orders it."""
    weight, name = tensor.read(), tensor.name
    if name.endswith("q_proj.weight"):
        return _interleaved(weight, config["num_attention_heads"])
    return _interleaved(weight, _kv_heads(config)) if name.endswith("k_proj.weight") else weight


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.gguf", type=click.Path(path_type=Path))
@click.option("--file-type", type=click.Choice(FILE_TYPES), default=FILE_TYPES[0], show_default=True)
def gguf_command(source: Path, out: Path, file_type: str) -> None:
    """Write the Llama checkpoint folder SRC as a GGUF file."""
    write_gguf(source, out, file_type=file_type)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Entry point of `python -m dovetail.export.target.gguf_writer`."""
    run(gguf_command, "python -m dovetail.export.target.gguf_writer")


if __name__ == "__main__":
    main()
