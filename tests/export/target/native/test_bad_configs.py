"""Proves that whatever stands in a config.json, the decoder that it describes is read or refused in one clear line:
nulls, old and new names side by side, values of another type, sizes that no machine has.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import transformers

from dovetail.export.sources.base import Source
from dovetail.export.target.native.decoder import Decoder
from dovetail.export.target.native.families import FAMILIES, read_decoder
from dovetail.runtime.errors import UserError

HOSTILE = (None, -1, 0, 1, 10**9, 2**63, 1.5, math.nan, math.inf, True, "x", "", [], [[]], ["x"], {}, {"rope_type": []})
ROPES = (
    {"rope_type": "yarn", "factor": 0},
    {"rope_type": "yarn", "factor": -2.0},
    {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0},
    {"rope_type": "yarn", "factor": 4, "beta_fast": 0},
    {"rope_type": "llama3"},
    {"rope_type": "llama3", "factor": "8", "low_freq_factor": 1, "high_freq_factor": 1},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "longrope", "short_factor": [1], "long_factor": None},
    {"rope_type": "longrope", "short_factor": ["x"] * 8, "long_factor": [0] * 8},
    {"rope_type": "factors", "factors": [0] * 8},
    {"rope_type": "martian"},
    {"rope_theta": 0},
    {"rope_theta": -1},
    {"rope_theta": 1e400},
    {"rope_theta": []},
    {"partial_rotary_factor": 10**9},
    {"partial_rotary_factor": -1},
    {"full_attention": 5},
    {"full_attention": {"rope_theta": None}, "sliding_attention": []},
)


def source_of(config: dict[str, Any]) -> Source:
    return Source(Path("made"), "checkpoint", config, {}, "", {}, {}, {})


def config_of(family: str) -> dict[str, Any]:
    config: dict[str, Any] = transformers.AutoConfig.for_model(family).to_dict()
    return config


def one_line(said: str) -> str:
    assert "\n" not in said
    assert len(said) < 500
    return said


def outcome(config: dict[str, Any]) -> Decoder | str:
    try:
        decoder = read_decoder(source_of(config))
    except UserError as error:
        return one_line(str(error))
    numbers = [decoder.attention_scale, decoder.embedding_scale, decoder.residual_scale, decoder.logits_divisor]
    numbers += [decoder.rms_norm_eps, decoder.logits_cap or 1.0]
    numbers += [f for layer in decoder.layers if layer.rotary for f in (*layer.rotary.frequencies, layer.rotary.scale)]
    assert all(type(number) is float and math.isfinite(number) for number in numbers), numbers
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_field(family: str) -> None:
    config = config_of(family)
    for name in config.keys() - {"model_type"}:
        for value in HOSTILE:
            outcome(config | {name: value})
    for rope in ROPES:
        outcome(config | {"rope_parameters": rope})


@pytest.mark.parametrize("family", FAMILIES)
def test_nulls_are_what_is_missing(family: str) -> None:
    config = config_of(family) | {"rope_scaling": None, "torch_dtype": None, "sliding_window": None}
    nothing = {name: value for name, value in config.items() if value is not None}
    assert outcome(config | {"rope_theta": None, "mlp_bias": None}) == outcome(nothing)


def test_old_and_new_names_of_one_thing() -> None:
    config = config_of("llama")
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    old = {"type": "linear", "factor": 4.0}
    both = outcome(config | {"rope_parameters": new, "rope_scaling": old, "rope_theta": 10000.0})
    assert both == outcome(config | {"rope_parameters": new})
    older = {name: value for name, value in config.items() if name != "rope_parameters"}
    assert both == outcome(older | {"rope_scaling": old, "rope_theta": 10000.0})
    said = outcome(config | {"rope_parameters": new, "rope_scaling": old | {"factor": 8.0}})
    assert "expected one factor, got 4.0 in rope_parameters and 8.0 beside it in the config of made" in str(said)
    said = outcome(config | {"rope_parameters": new, "rope_theta": 5.0})
    assert "expected one rope_theta, got 10000.0 in rope_parameters and 5.0 beside it" in str(said)
    assert outcome(config | {"torch_dtype": "float16", "dtype": "bfloat16"}) == outcome(config)  # weights have types
