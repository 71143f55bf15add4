"""Proves what a draft takes over of its target's config, in every family: widths, heads, and the rotary frequencies of
the layers that see the whole context, as transformers computes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import families
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dovetail.export.draft.config import block_sizes, config_for
from dovetail.export.draft.kinds import KINDS
from dovetail.export.quiet import quiet_torch
from dovetail.export.sources.base import Source
from dovetail.runtime.errors import UserError


def source_of(config: dict[str, Any]) -> Source:
    return Source(Path("made"), "checkpoint", config, {}, "", {}, {}, {})


def transformers_frequencies(config: Any, head_dim: int) -> tuple[torch.Tensor, float]:
    """Of the layers with full attention: radians a position, and the factor on cosine and sine."""
    rope, kind = config.rope_parameters, None
    if "full_attention" in rope:
        rope, kind = rope["full_attention"], "full_attention"
    if rope.get("rope_type", "default") == "default":
        return rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim), 1.0
    layer: dict[str, Any] = {"layer_type": kind} if kind else {}
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), seq_len=None, **layer)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_draft_has_the_targets_heads_and_positions(name: str) -> None:
    with quiet_torch():
        config = families.family_config(*families.FAMILIES[name])
    ours = config_for(block_sizes(source_of(config.to_dict())), 2)
    head_dim = getattr(config, "head_dim", None) or 16
    assert (ours.hidden_size, ours.intermediate_size, ours.vocab_size) == (64, 128, 512)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (4, config.num_key_value_heads, head_dim)
    assert (ours.num_layers, ours.rms_norm_eps) == (2, config.rms_norm_eps)
    frequencies, scale = transformers_frequencies(config, head_dim)
    rotated, still = ours.rope_frequencies[: len(frequencies)], ours.rope_frequencies[len(frequencies) :]
    np.testing.assert_allclose(rotated, frequencies.numpy(), rtol=1e-6)
    assert set(still) <= {0.0}
    assert ours.rope_scale == pytest.approx(scale)


def test_feature_layers_are_those_of_the_kind() -> None:
    sizes = block_sizes(source_of(families.family_config("Llama", {"num_hidden_layers": 32}).to_dict()))
    assert KINDS["eagle3"].config_for(sizes, 1).feature_layers == (2, 16, 29)
    assert KINDS["dgf"].config_for(sizes, 1).feature_layers == ()


def test_a_draft_without_blocks() -> None:
    sizes = block_sizes(source_of(families.family_config("Llama", {}).to_dict()))
    with pytest.raises(UserError, match="at least one block, got `blocks` 0"):
        config_for(sizes, 0)
