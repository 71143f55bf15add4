"""Proves how a config is read: rotary frequencies as transformers computes them, old and new names, nulls, defaults;
and that what contradicts itself is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, SmolLM3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dovetail.export.sources.base import Source
from dovetail.export.target.native.decoder import Decoder
from dovetail.export.target.native.families import read_decoder
from dovetail.export.target.native.rotary import read_rotary
from dovetail.runtime.errors import UserError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "yarn with magnitudes": {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
        "beta_fast": 24,
    },
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0 + i / 10 for i in range(32)],
        "long_factor": [2.0 + i for i in range(32)],
        "original_max_position_embeddings": 512,
    },
}


def decoder(config: dict[str, Any]) -> Decoder:
    return read_decoder(Source(Path("here"), "checkpoint", config, {}, "", {}, {}, {}))


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_transformers(name: str) -> None:
    kind = name.partition(" ")[0]
    config = LlamaConfig(
        max_position_embeddings=2048, head_dim=64, rope_parameters={"rope_type": kind, "rope_theta": 5e4, **ROPES[name]}
    )
    ours = read_rotary(config.rope_parameters, 64, 2048, "here")
    for length, frequencies in ((None, ours.frequencies), (2000, ours.long_frequencies)):
        if frequencies is not None:
            theirs, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
            np.testing.assert_allclose(frequencies, theirs.numpy(), rtol=1e-6)
            assert abs(ours.scale - scale) < 1e-9
    assert (ours.border, ours.long_frequencies is None) == ((512, False) if kind == "longrope" else (None, True))


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        MistralConfig(sliding_window=512),
        Qwen2Config(use_sliding_window=True, sliding_window=512, max_window_layers=4),
        Phi3Config(partial_rotary_factor=0.5),
        SmolLM3Config(),
        Gemma3TextConfig(),
    ],
)
def test_layers_are_transformers(config: Any) -> None:
    """From what save_pretrained writes, and from the same without what a config of today has."""
    document = config.to_dict() | {"architectures": None}
    ours = decoder(document)
    kinds = getattr(config, "layer_types", None) or [
        "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    ] * len(ours.layers)
    assert [layer.window is not None for layer in ours.layers] == [kind == "sliding_attention" for kind in kinds]
    assert decoder({name: value for name, value in document.items() if name != "layer_types"}) == ours


def test_old_names_are_the_new_ones() -> None:
    new = LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert decoder(old) == decoder(new) == decoder(new | old)
    nulls = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "sliding_window": None}
    assert decoder(LLAMA | nulls) == decoder(LLAMA)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": None}, "expected hidden_size as a positive whole number in the config of here, got None"),
        ({"num_hidden_layers": "2"}, "expected num_hidden_layers as a positive whole number .* got '2'"),
        ({"num_attention_heads": -1}, "expected num_attention_heads"),
        ({"num_key_value_heads": 3}, "heads that the key/value heads divide"),
        ({"hidden_act": "relu2"}, "expected an activation of silu, .* got 'relu2'"),
        ({"rms_norm_eps": "small"}, "expected rms_norm_eps as a positive number"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "expected a rope_type of default, .* got 'spiral'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "the numbers of rope_type llama3 .* 'low_freq_factor'",
        ),
        ({"rope_scaling": 7}, "expected rope_parameters as an object"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}},
            "expected one rope_theta, got 20000.0 .* 10000.0",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"], "sliding_window": 9, "use_sliding_window": True},
            "expected 2 layer_types",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "expected 2 no_rope_layers"),
    ],
)
def test_what_contradicts_itself_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as raised:
        decoder(LLAMA | changes)
    assert "\n" not in str(raised.value)
