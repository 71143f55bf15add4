"""Which tensors a draft has, by name and shape, and whether those of a folder are these.

Letters: D hidden size, L feature layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.kinds import KINDS
from dovetail.export.draft.weights import DraftWeights

Shapes = dict[str, tuple[int, ...]]


def weight_shapes(config: DraftConfig) -> Shapes:
    """Of the trained part, but for a head of its own."""
    kind, size = KINDS[config.kind], config.hidden_size
    shapes = {f"fusion.{name}": shape for name, shape in kind.fusion_shapes(config).items()}
    for i in range(config.num_layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in _block_shapes(config, first=i == 0).items()}
    if kind.output_norm:
        shapes["output_norm.weight"] = (size,)
    if config.feature_layers:
        shapes["projection.weight"] = (size, len(config.feature_layers) * size)  # [D, L * D]
    return shapes


def _block_shapes(config: DraftConfig, first: bool) -> Shapes:
    kind, size, inner = KINDS[config.kind], config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    read = 2 * size if first and kind.first_block_reads_pair else size
    shapes: Shapes = {
        "q_proj.weight": (queries, read),
        "k_proj.weight": (keys, read),
        "v_proj.weight": (keys, read),
        "o_proj.weight": (size, queries),
        "mlp_norm.weight": (size,),
        "gate_proj.weight": (inner, size),
        "up_proj.weight": (inner, size),
        "down_proj.weight": (size, inner),
    }
    if not first or kind.first_block_norm:
        shapes["input_norm.weight"] = (size,)
    if config.qkv_bias:
        shapes |= {"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)}
    if config.qk_norm:
        shapes |= {"q_norm.weight": (config.head_dim,), "k_norm.weight": (config.head_dim,)}
    return shapes


def misfit(config: DraftConfig, tensors: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is not as a draft of this config has it, as words for (expected, got): a tensor that is missing, that
    nothing reads, or that has another shape. None where all is well.
    """
    expected, last = f"the weights of a draft of kind {config.kind}", f"blocks.{config.num_layers - 1}.o_proj.weight"
    if last not in tensors:  # before a config of a billion blocks makes a list of their names
        return expected, f"no tensor for {last}"
    wanted = weight_shapes(config)
    missing, strange = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or strange:
        what = f"no tensor for {missing[0]}" if missing else f"the tensor {strange[0]}, which nothing reads"
        return expected, what
    for name, tensor in sorted(tensors.items()):
        if tuple(tensor.shape) != wanted[name]:
            return f"{name} of shape {wanted[name]}", f"{tuple(tensor.shape)}"
    return None


def num_parameters(draft: DraftWeights) -> int:
    """Weights of the trained part, to which a head of its own belongs."""
    has_head = KINDS[draft.config.kind].has_own_head(draft.config)
    return sum(array.size for array in draft.tensors.values()) + (draft.lm_head.size if has_head else 0)
