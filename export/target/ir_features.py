"""What a draft needs of a target that is an OpenVINO graph, without its checkpoint: the weights of embedding and LM
head, and its hidden states.

Letters: B sequences, T tokens, V vocabulary, D hidden size, L feature layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.export.draft.target_features import layer_input
from dovetail.export.target.ir_graph import lm_head
from dovetail.export.target.ir_weights import stateful_feeds
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.openvino_core import openvino_core

Matrix = NDArray[np.float32]


def embedding_and_head(model: Any) -> tuple[Matrix, Matrix]:
    """(the embedding [V, D], the LM head [V, D]) of a decoder, float32: as they are stored, or as quantised weights are
    computed with.

    Raises `UserError` where they are not plain matrices, one row a token.
    """
    head = lm_head(model)
    rows = _constant(head.input_value(1), "LM head")
    head_weight = rows if head.get_attributes()["transpose_b"] else np.ascontiguousarray(rows.T)
    tables = [
        _constant(node.input_value(0), "embedding")
        for node in model.get_ops()
        if node.get_type_name() == "Gather" and _comes_from(node.input_value(1), "input_ids")
    ]
    matches = [table for table in tables if table.shape == head_weight.shape]
    if len(matches) != 1 or len(tables) != 1:
        shapes = ", ".join(str(table.shape) for table in tables) or "none"
        raise UserError(
            f"expected one embedding of shape {head_weight.shape} in the IR, as its LM head, got {shapes}; give the "
            f"checkpoint for a target with a draft"
        )
    return matches[0], head_weight


def features(model: Any, ids: NDArray[np.int64], layers: Sequence[int]) -> Matrix:
    """ids [T] -> the inputs of `layers` side by side and the last hidden state, after the final norm, [T, (L + 1) * D],
    read from an empty cache. `model` stays.
    """
    import openvino as ov
    from openvino import opset13

    clone = model.clone()
    ports = [*(layer_input(clone, layer) for layer in layers), lm_head(clone).input_value(0)]
    joined = opset13.concat([opset13.convert(port, np.float32) for port in ports], axis=-1)
    probe = ov.Model([opset13.result(joined)], clone.get_sinks(), clone.get_parameters(), clone.get_variables())
    precise = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
    }
    request = openvino_core().compile_model(probe, "CPU", precise).create_infer_request()
    wanted = {name for port in request.model_inputs for name in port.get_names()}
    request.infer({name: value for name, value in stateful_feeds(ids[None]).items() if name in wanted})
    return np.array(request.get_output_tensor(0).data[0], np.float32)


def _constant(port: Any, what: str) -> Matrix:
    """A matrix of the graph that depends on no input: its weights, perhaps behind conversions and scales."""
    import openvino as ov
    from openvino import opset13

    node, shape = port.get_node(), port.get_partial_shape()
    if shape.is_dynamic or len(shape) != 2 or _inputs_of(node):
        raise UserError(
            f"expected the {what} of the IR to be a matrix of weights, got {node.get_type_name()} of {shape}; give the "
            f"checkpoint for a target with a draft"
        )
    part = ov.Model([opset13.result(opset13.convert(port, np.float32))], []).clone()
    return np.array(openvino_core().compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0], np.float32)


def _inputs_of(node: Any) -> set[str]:
    """Names of the model's inputs and states that `node` depends on."""
    if node.get_type_name() in ("Parameter", "ReadValue"):
        return set(node.output(0).get_names()) or {node.get_friendly_name()}
    return {name for i in range(node.get_input_size()) for name in _inputs_of(node.input_value(i).get_node())}


def _comes_from(port: Any, name: str) -> bool:
    """Whether a value is the input `name`, perhaps converted or reshaped."""
    node = port.get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Parameter" and name in node.output(0).get_names()
