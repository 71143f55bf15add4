"""Readers of what is exported: checkpoints, GGUF files, drafts: see untrusted_readers.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from judged_readers import Reader, also, json_seeds, scratch, written
from models.tiny_gguf import write_gguf
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from settings_readers import tokenizer_seeds

from dovetail.export.draft import config as draft_config
from dovetail.export.draft.files import draft_source
from dovetail.export.draft.published import DraftedTarget, PublishedDraft
from dovetail.export.sources import settings
from dovetail.export.sources.base import Source
from dovetail.export.sources.checkpoint import weight_files
from dovetail.export.sources.finding import find_source
from dovetail.export.sources.llama_shapes import read_shape
from dovetail.export.sources.safetensors_file import read_safetensors
from dovetail.export.target.native.families import is_native, read_decoder
from dovetail.export.target.native.tensor_names import check_tensors, tensor_shapes
from dovetail.runtime.errors import UserError
from dovetail.runtime.text.tokenizer import read_native

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 6,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
_CONFIGS = (
    _LLAMA,
    _LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    _LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 16}},
    _LLAMA | {"model_type": "gemma3_text", "head_dim": 4, "sliding_window": 16, "layer_types": ["full_attention"],
              "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}},
    _LLAMA | {"model_type": "phi3", "partial_rotary_factor": 0.5, "original_max_position_embeddings": 32,
              "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    _LLAMA | {"model_type": "smollm3", "no_rope_layers": [1], "quantization_config": {"quant_method": "fp8"}},
)  # fmt: skip


@functools.cache
def _checkpoint() -> Path:
    folder = scratch() / "checkpoint"
    folder.mkdir()
    source = Source(folder, "checkpoint", _LLAMA, {}, "", {}, {}, {})
    weights = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(read_decoder(source)).items()}
    (folder / "model.safetensors").write_bytes(save_safetensors(weights))
    (folder / "tokenizer.json").write_bytes(tokenizer_seeds()[0])
    (folder / "config.json").write_text(json.dumps(_LLAMA))
    return folder


def _checkpoint_config(data: bytes) -> None:
    (_checkpoint() / "config.json").write_bytes(data)
    source = find_source(_checkpoint())
    also(lambda: read_shape(_checkpoint()))  # what another command reads of it
    if is_native(source):
        decoder = read_decoder(source)
        numbers = [decoder.attention_scale, decoder.embedding_scale, decoder.residual_scale, decoder.logits_divisor]
        assert all(map(math.isfinite, numbers)), numbers
        check_tensors(source, decoder)


def _checkpoint_settings(data: bytes) -> None:
    """The small files beside a checkpoint's config, all of the same bytes."""
    folder = scratch() / "settings"
    for name in ("tokenizer_config", "special_tokens_map", "generation_config", "tokenizer"):
        written(f"settings/{name}.json", data)
    also(lambda: json.dumps(settings.read_special_tokens(folder)))
    also(lambda: json.dumps(settings.read_chat_templates(folder)))
    also(lambda: json.dumps(settings.read_generation_config(folder, {"eos_token_id": 1})))
    written("settings/model.safetensors.index.json", data)
    also(lambda: weight_files(folder))
    settings.read_tokenizer(folder)


_SETTINGS = (
    {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"},
    {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}], "eos_token_id": 2},
)


def _settings_seeds() -> list[bytes]:
    return [*(json.dumps(one).encode() for one in _SETTINGS), tokenizer_seeds()[0]]


def _draft_config(data: bytes) -> None:
    folder = scratch() / "draft"
    written("draft/config.json", data)
    written("draft/model.safetensors", b"")
    if "kind" in draft_source(folder).config:
        made = draft_config.read_config(folder)
        draft_config.check_fits(made, 6, 8)
        for field in dataclasses.fields(made):
            value = getattr(made, field.name)
            good = {
                "bool": (bool,), "str": (str,), "int": (int,), "float": (int, float), "int | None": (int, type(None)),
                "str | None": (str, type(None)),
            }.get(str(field.type), (tuple,))  # fmt: skip
            assert type(value) in good, f"{field.name} {value!r}"
        assert all(type(layer) is int for layer in made.feature_layers)
        return
    tensors = {"layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float32)}
    target = DraftedTarget(find_source(_whole_checkpoint()), *np.zeros((2, 6, 8), np.float32))
    made = PublishedDraft(draft_source(folder), tensors, target).config("eagle")
    assert all(map(math.isfinite, made.rope_frequencies))


def _whole_checkpoint() -> Path:
    (_checkpoint() / "config.json").write_text(json.dumps(_LLAMA))
    return _checkpoint()


_DRAFT = {
    "kind": "dgf",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "vocab_size": 6,
    "rms_norm_eps": 1e-5,
    "rope_frequencies": [1.0, 0.01],
    "head_size": 4,
    "feature_layers": [0, 1],
    "qk_norm": True,
    "vocabulary_sha256": None,
}


def _gguf(data: bytes) -> None:
    path = written("model.gguf", data)
    source = find_source(path)
    for tensor in source.tensors.values():
        assert tensor.read().shape == tensor.shape
    read_decoder(source)
    document = json.loads(source.tokenizer)
    read_native(document)
    json.dumps(source.config, allow_nan=False)
    json.dumps(source.generation_config, allow_nan=False)


def _gguf_documents() -> Iterator[dict[str, Any]]:
    """Values, and shapes of tensors: a Llama of one layer, and a Gemma 3 of SentencePiece's tokens."""
    sizes = {
        "context_length": 64,
        "embedding_length": 8,
        "block_count": 1,
        "feed_forward_length": 8,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
        "attention.sliding_window": 16,
    }
    layer = {"attn_q": [8, 8], "attn_k": [4, 8], "attn_v": [4, 8], "attn_output": [8, 8], "ffn_gate": [8, 8]}
    layer |= {"ffn_up": [8, 8], "ffn_down": [8, 8], "attn_norm": [8], "ffn_norm": [8]}
    byte = [f"<0x{value:02X}>" for value in range(256)]
    for kind, ours in (("llama", "gpt2"), ("gemma3", "llama")):
        tokens = ["a", "b", "ab", "</s>"] if ours == "gpt2" else ["<unk>", "a", "b", "ab", *byte]
        values: dict[str, Any] = {"general.architecture": kind}
        values |= {f"{kind}.{name}": value for name, value in sizes.items()}
        values |= {"tokenizer.ggml.model": ours, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos_token_id": 1}
        values |= {"tokenizer.ggml.eos_token_id": 3, "tokenizer.chat_template": "{{ messages }}"}
        own = layer
        if ours == "gpt2":
            values |= {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"]}
            values["tokenizer.ggml.token_type"] = [1, 1, 1, 3]
        else:
            values["tokenizer.ggml.token_type"] = [2, 1, 1, 1, *[6] * 256]
            values["tokenizer.ggml.scores"] = [0.0, -1.0, -2.0, -3.0, *[0.0] * 256]
            own |= {"post_attention_norm": [8], "post_ffw_norm": [8], "attn_q_norm": [4], "attn_k_norm": [4]}
        shapes = {"token_embd": [len(tokens), 8], "output_norm": [8]} | {f"blk.0.{n}": own[n] for n in own}
        yield {"values": values, "shapes": shapes}


def _written_gguf(document: Any) -> bytes:
    tensors = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in document["shapes"].items()}
    return write_gguf(scratch() / "written.gguf", document["values"], tensors).read_bytes()


def _gguf_seeds() -> list[bytes]:
    return list(map(_written_gguf, _gguf_documents()))


def _gguf_metadata(data: bytes) -> None:
    """A GGUF file that is whole, and whatever its values say."""
    try:
        document = json.loads(data)
        assert all(type(size) is int for shape in document["shapes"].values() for size in shape)
        assert sum(math.prod(shape) for shape in document["shapes"].values()) < 1 << 16
        written = _written_gguf(document)
    except Exception:  # there is no such file, or a large one
        raise UserError("expected values that can be written; change them") from None
    _gguf(written)


def _gguf_metadata_seeds() -> list[bytes]:
    return [json.dumps(document).encode() for document in _gguf_documents()]


def _safetensors(data: bytes) -> None:
    stored = read_safetensors([written("model.safetensors", data)])
    for tensor in stored.values():
        assert tensor.read().shape == tensor.shape
    try:
        theirs = load_safetensors(data)
    except (SafetensorError, KeyError, ValueError, AttributeError, TypeError):  # types that numpy lacks
        return
    for name, tensor in stored.items():
        if not tensor.kind.startswith("F8"):
            expected = theirs[name].astype(np.float32)
            assert np.array_equal(tensor.read(), expected, equal_nan=True), name


def _safetensors_seeds() -> list[bytes]:
    plain = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16), "c": np.ones((0, 2), np.int64)}
    header = {
        "w": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]},
        "w_scale_inv": {"dtype": "F32", "shape": [1, 1], "data_offsets": [8, 12]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    return [save_safetensors(plain), len(text).to_bytes(8, "little") + text + bytes(12)]


READERS: Mapping[str, Reader] = {
    "gguf_metadata": Reader(_gguf_metadata, _gguf_metadata_seeds),
    "gguf": Reader(_gguf, _gguf_seeds, "bytes"),
    "safetensors": Reader(_safetensors, _safetensors_seeds, "header"),
    "checkpoint_config": Reader(_checkpoint_config, json_seeds(*_CONFIGS)),
    "checkpoint_settings": Reader(_checkpoint_settings, _settings_seeds),
    "draft_config": Reader(_draft_config, json_seeds(_DRAFT, _LLAMA)),
}
