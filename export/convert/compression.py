"""How a target's weights are stored: the formats, compressing a model to one, and telling which one a model has."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dovetail.export.target.compression import Compression
from dovetail.runtime.artifact.manifest import WEIGHT_FORMATS
from dovetail.runtime.errors import UserError

CALIBRATION_WINDOWS, CALIBRATION_WINDOW = 64, 256
_DEFAULT_GROUP = 128
_STORED = {"i8": "int8", "u8": "int8_asym", "i4": "int4", "u4": "int4", "f16": "fp16", "bf16": "fp16", "f32": "fp32"}


def compress(model: Any, compression: Compression, widths: Sequence[int]) -> Any:
    """The OpenVINO `model` with its weights stored as asked. `widths` are the matrices' input sizes. Raises `UserError`
    for a group size that does not divide them.
    """
    if compression.weight_format == "fp32":
        return model
    if compression.weight_format == "fp16":
        return _halved(model)
    import nncf

    mode = nncf.CompressWeightsMode
    # Of its logger alone: `nncf.set_log_level` also changes every handler that hangs there, and those may be others'.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    if compression.weight_format == "int4":
        data = _calibration(model, compression.calibration_ids)
        model = nncf.compress_weights(
            model,
            mode=mode.INT4_SYM,
            ratio=1 - compression.int8_share,
            group_size=_group_size(compression, widths),
            dataset=data,
            awq=True if data else None,
            scale_estimation=True if data else None,
        )
    else:
        symmetric = compression.weight_format == "int8"
        model = nncf.compress_weights(model, mode=mode.INT8_SYM if symmetric else mode.INT8_ASYM)
    stored = {_STORED.get(name, name) for name in weight_elements(model)}
    assert compression.weight_format in stored, f"expected {compression.weight_format} weights, got {sorted(stored)}"
    return model


def _halved(model: Any) -> Any:
    """`model` with its float32 matrices as float16; bfloat16 ones have 16 bits already, and stay.

    Norms, biases and rotary frequencies keep float32: `save_model`'s own compression would round the latter, and an
    error of 2^-12 of a frequency is an angle at position 500.
    """
    from openvino import opset13
    from openvino._offline_transformations import compress_model_transformation

    small = {
        node.get_friendly_name(): np.array(node.get_data())
        for node in model.get_ops()
        if _is_constant(node, "f32") and sum(size > 1 for size in node.get_output_shape(0)) < 2
    }
    compress_model_transformation(model)  # each constant now is a float16 one behind a conversion that has its name
    for node in model.get_ops():
        name = node.get_friendly_name()
        if name in small and node.get_type_name() == "Convert" and _is_constant(node.input_value(0).get_node(), "f16"):
            exact = opset13.constant(small[name])
            exact.set_friendly_name(name)
            for port in node.output(0).get_target_inputs():
                port.replace_source_output(exact.output(0))
    model.validate_nodes_and_infer_types()
    return model


def _is_constant(node: Any, kind: str) -> bool:
    return bool(node.get_type_name() == "Constant" and node.get_output_element_type(0).to_string() == kind)


def _group_size(compression: Compression, widths: Sequence[int]) -> int:
    if compression.group_size is None:
        return next((g for g in (_DEFAULT_GROUP, 64, 32, 16) if all(width % g == 0 for width in widths)), -1)
    odd = [width for width in widths if compression.group_size != -1 and width % compression.group_size]
    if odd:
        raise UserError(
            f"expected a `group_size` that divides every matrix's input size, got {compression.group_size} for "
            f"{odd[0]}; choose a smaller one"
        )
    return compression.group_size


def _calibration(model: Any, ids: tuple[int, ...] | None) -> Any:
    """The text in windows, as feeds of a stateful model; None without text."""
    if ids is None:
        return None
    import nncf

    inputs = {name for port in model.inputs for name in port.get_names()}
    length = min(CALIBRATION_WINDOW, len(ids))
    starts = range(0, len(ids) - length + 1, length)[:CALIBRATION_WINDOWS]
    windows = [np.array(ids[start : start + length], np.int64)[None] for start in starts]
    return nncf.Dataset([{name: feed for name, feed in stateful_feeds(w).items() if name in inputs} for w in windows])


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
    if name not in _STORED:
        raise UserError(f"expected weights in one of {', '.join(WEIGHT_FORMATS)}, got {name}; export the model again")
    return _STORED[name]


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
