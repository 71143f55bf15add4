"""Reading an OpenVINO graph: how its weights are stored, and what it is fed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from dovetail.runtime.artifact.manifest import WEIGHT_FORMATS
from dovetail.runtime.errors import UserError

FORMATS = {"i8": "int8", "u8": "int8_asym", "i4": "int4", "u4": "int4", "f16": "fp16", "bf16": "fp16", "f32": "fp32"}
"""OpenVINO's element type -> our weight format."""


def stateful_feeds(ids: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, np.ndarray[Any, Any]]:
    """What a stateful decoder reads with `ids` [B, T] behind an empty cache."""
    batch, length = ids.shape
    return {
        "input_ids": ids,
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
        "beam_idx": np.arange(batch, dtype=np.int32),
    }


def weight_elements(model: Any) -> Counter[str]:
    """How many weights of each element type an OpenVINO model has: its constants, without scales, zero points and
    single numbers.
    """
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    scales = {name for node in constants if _is_integer(node) for name in _scales_of(node)}
    counts: Counter[str] = Counter()
    for node in constants:
        kind, size = node.get_output_element_type(0), _size(node)
        if size > 1 and node.get_friendly_name() not in scales and (kind.is_real() or _is_integer(node)):
            counts[kind.to_string()] += size
    return counts


def stored_format(model: Any) -> str:
    """The format that most of a model's weights have. Raises `UserError` where it is none of ours."""
    elements = weight_elements(model)
    name, _ = elements.most_common(1)[0] if elements else ("none", 0)
    if name not in FORMATS:
        raise UserError(f"expected weights in one of {', '.join(WEIGHT_FORMATS)}, got {name}; export the model again")
    return FORMATS[name]


def _is_integer(node: Any) -> bool:
    return node.get_output_element_type(0).to_string() in ("i8", "u8", "i4", "u4")


def _scales_of(node: Any) -> set[str]:
    """Names of the constants that a quantised constant is scaled and shifted with, and of itself if it is a shift."""
    names = set()
    for port in _readers(node):
        reader = port.get_node()
        if reader.get_type_name() in ("Multiply", "Subtract"):
            if port.get_index() == 1:
                names.add(node.get_friendly_name())
            for other in _readers(reader) if reader.get_type_name() == "Subtract" else []:
                names |= _constants_of(other.get_node().input_value(1))
            names |= _constants_of(reader.input_value(1))
    return names


def _readers(node: Any) -> list[Any]:
    """The inputs that read `node`, conversions skipped."""
    ports = list(node.output(0).get_target_inputs())
    return [
        found
        for port in ports
        for found in (_readers(port.get_node()) if port.get_node().get_type_name() == "Convert" else [port])
    ]


def _constants_of(value: Any) -> set[str]:
    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return {node.get_friendly_name()} if node.get_type_name() == "Constant" else set()


def _size(node: Any) -> int:
    size = 1
    for dimension in node.get_output_shape(0):
        size *= int(dimension)
    return size
