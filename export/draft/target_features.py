"""What of a target's computation a draft is fed that is not its last hidden state: the inputs of a few layers, added
to the OpenVINO model as its `hidden_states`.

Letters: B sequences, T tokens, D hidden size, L feature layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dovetail.export.sources.tensors import Matrix
from dovetail.runtime.artifact.manifest import FEATURES_OUTPUT
from dovetail.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Taps:
    """The feature layers of a target, and the matrix [D, L * D] that makes a feature of their inputs."""

    layers: tuple[int, ...]
    projection: Matrix

    def add(self, model: Any) -> Any:
        """See `add_projected_features`."""
        return add_projected_features(model, self.layers, self.projection)


def add_projected_features(model: Any, layers: Sequence[int], projection: Matrix) -> Any:
    """The OpenVINO model with one more result, `hidden_states` [B, T, D] float32: the inputs of its `layers` side by
    side times the transposed `projection` [D, L * D] (EAGLE-3's `fc`), so that D numbers a token cross to the draft,
    not L * D.

    Before weights are compressed: the projection is one of them. Raises `UserError` where the layers can't be found.
    """
    from openvino import opset13 as ops

    size = projection.shape[0]
    inputs = [layer_input(model, layer) for layer in layers]
    for port in inputs:
        shape = port.get_partial_shape()
        assert shape.rank.get_length() == 3, f"expected a residual stream [B, T, D], got {shape}"
        assert shape[2].get_length() * len(layers) == projection.shape[1], f"a stream of another width, {shape}"
    weight = ops.constant(np.ascontiguousarray(projection, np.float32), name="draft.projection")
    projected = ops.matmul(ops.concat(inputs, axis=-1), weight, transpose_a=False, transpose_b=True)
    projected.set_friendly_name("draft.projection/MatMul")
    result = ops.result(projected, name=FEATURES_OUTPUT)
    result.output(0).get_tensor().set_names({FEATURES_OUTPUT})
    model.add_results([result])
    model.validate_nodes_and_infer_types()
    assert model.output(FEATURES_OUTPUT).get_partial_shape()[2].get_length() == size
    return model


def layer_input(model: Any, layer: int) -> Any:
    """What decoder layer `layer` reads: in a graph of ours the node of that name, in one of optimum-intel's the one
    activation that enters the layer's input norm from outside.
    """
    own = [node for node in model.get_ops() if node.get_friendly_name() == f"layers.{layer}.input"]
    if own:
        return own[0].output(0)
    inside = {
        node.get_friendly_name(): node
        for node in model.get_ops()
        if f".layers.{layer}.input_layernorm/" in node.get_friendly_name()
    }
    entering = {}
    for node in inside.values():
        for port in (node.input_value(i) for i in range(node.get_input_size())):
            source = port.get_node()
            outside = source.get_friendly_name() not in inside
            if outside and port.get_partial_shape().rank.get_length() == 3 and not _is_constant(source):
                entering[source.get_friendly_name(), port.get_index()] = port
    if len(entering) != 1:
        raise UserError(
            f"expected one input of the target's layer {layer} for the draft's features, got {len(entering)}; this "
            f"architecture has no draft of kind eagle3 yet"
        )
    return next(iter(entering.values()))


def _is_constant(node: Any) -> bool:
    """A weight, perhaps behind conversions."""
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
