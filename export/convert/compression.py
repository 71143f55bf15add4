"""Weights in fewer bits by nncf: of a graph that optimum-intel made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from dovetail.export.target.compression import Compression
from dovetail.export.target.ir_weights import FORMATS, stateful_feeds, weight_elements
from dovetail.runtime.errors import UserError

CALIBRATION_WINDOWS, CALIBRATION_WINDOW = 64, 256
_DEFAULT_GROUP = 128


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
    stored = {FORMATS.get(name, name) for name in weight_elements(model)}
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
