"""Proves that the tensors a decoder is said to need are those, of those shapes, that transformers' own models have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import families

from dovetail.export.sources.base import Source
from dovetail.export.sources.tensors import StoredTensor
from dovetail.export.target.native.families import FAMILIES, read_decoder
from dovetail.export.target.native.tensor_names import HEAD, check_tensors, tensor_shapes
from dovetail.runtime.errors import UserError

_SIZES = families._SIZES | {"head_dim": 32, "attn_logit_softcapping": None}
_ATTENTION_BIAS = ("llama", "smollm3", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2")
_MLP_BIAS = ("llama", "smollm3", "granite")


def transformers_model(family: str, **special: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json and the shapes of the parameters."""
    biases = {"attention_bias": family in _ATTENTION_BIAS, "mlp_bias": family in _MLP_BIAS}
    sizes = _SIZES | {name: True for name, has in biases.items() if has} | special
    if family == "phi3":
        del sizes["head_dim"]
    config = transformers.AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return config.to_dict(), {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def source_of(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Source:
    tensors = {
        name: StoredTensor(name, shape, "F32", np.zeros(shape, np.float32), lambda raw: raw)
        for name, shape in shapes.items()
    }
    return Source(Path("made"), "checkpoint", config, tensors, "", {}, {}, {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_names_and_shapes_are_those_of_transformers(family: str, tied: bool) -> None:
    config, shapes = transformers_model(family, tie_word_embeddings=tied)
    decoder = read_decoder(source_of(config, shapes))
    assert tensor_shapes(decoder) == shapes
    check_tensors(source_of(config, shapes), decoder)


def test_a_tensor_that_is_missing_of_another_shape_or_unknown_is_named() -> None:
    config, shapes = transformers_model("llama")
    decoder = read_decoder(source_of(config, shapes))
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(UserError, match=rf"expected {name} of shape \[64, 64\] in made, got none"):
        check_tensors(source_of(config, {n: shape for n, shape in shapes.items() if n != name}), decoder)
    with pytest.raises(UserError, match=rf"expected {name} of shape \[64, 64\] in made, got \[32, 64\]"):
        check_tensors(source_of(config, shapes | {name: (32, 64)}), decoder)
    with pytest.raises(UserError, match=r"only the tensors of a llama in made, got model\.extra\.weight"):
        check_tensors(source_of(config, shapes | {"model.extra.weight": (1,)}), decoder)
    check_tensors(source_of(config, shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}), decoder)


def test_a_tied_head_may_only_be_a_copy() -> None:
    config, shapes = transformers_model("llama", tie_word_embeddings=True)
    source = source_of(config, shapes | {HEAD: (families.VOCAB, families.HIDDEN)})
    check_tensors(source, read_decoder(source))
    head = dataclasses.replace(source.tensors[HEAD], raw=source.tensors[HEAD].raw + 1)
    with pytest.raises(UserError, match=f"got an {HEAD} of its own"):
        check_tensors(dataclasses.replace(source, tensors=dict(source.tensors) | {HEAD: head}), read_decoder(source))
