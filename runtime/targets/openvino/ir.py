"""The target's graph: read, rewritten to paged attention with a tree mask, its LM head restricted to the rows wanted.

Letters: R rows of logits wanted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
from openvino._offline_transformations import paged_attention_transformation
from openvino.frontend import FrontEndManager

from dovetail.runtime.artifact.manifest import FEATURES_OUTPUT
from dovetail.runtime.errors import ArtifactError
from dovetail.runtime.hardware.openvino_core import openvino_core
from dovetail.runtime.targets.openvino.inputs import LOGIT_ROWS
from dovetail.runtime.targets.openvino.mapped_weights import MappedWeights

_WINDOW_INPUT = 10  # of PagedAttention: `sliding_window`, a scalar
_BEHIND_HEAD = ("Convert", "Multiply", "Divide", "Tanh", "Add")  # between the LM head and logits: soft caps, a bias


def read_ir(path: Path, weights: MappedWeights | None = None) -> ov.Model:
    """Read an OpenVINO IR with the IR front end only; its weights from `weights`, which must outlive the model, or from
    the file beside it.
    """
    front_end = FrontEndManager().load_by_framework("ir")
    try:
        if weights is None:
            return front_end.convert(front_end.load(str(path)))
        if not front_end.supported(str(path)):  # `read_model` goes by content, and would start other parsers
            raise RuntimeError("a file that is no IR")
        return openvino_core().read_model(path.read_bytes(), weights.tensor)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path}: expected a target that OpenVINO reads, got: {reason}; export again") from None


def to_paged_attention(model: ov.Model) -> ov.Model:
    """Rewrite every attention of a stateful decoder to PagedAttention with a tree mask (`qq_bias`)."""
    if not model.get_sinks():
        raise ArtifactError(
            "expected a stateful decoder IR, got one without state; "
            "export it with optimum-intel's task text-generation-with-past"
        )
    allow_qq_bias = True
    paged_attention_transformation(model, False, False, False, False, False, False, allow_qq_bias)
    names = {name for port in model.inputs for name in port.get_names()}
    assert {"qq_bias", "key_cache.0", "value_cache.0"} <= names, "the PagedAttention transformation changed its inputs"
    return model


def weight_group(model: ov.Model) -> int | None:
    """The smallest number of inputs that share a scale in a quantised matrix of `model`; None: a row's do.

    Activations must be rounded in groups that are no larger, or a matrix is multiplied in float32.
    """
    small = (ov.Type.i4, ov.Type.u4, ov.Type.i8, ov.Type.u8)
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    groups = (
        int(node.get_output_shape(0)[2])
        for node in constants
        if node.get_output_element_type(0) in small and len(node.get_output_shape(0)) == 3
    )
    return min((group for group in groups if group > 1), default=None)  # 1: zero points


def attention_windows(model: ov.Model) -> list[int]:
    """How many tokens each PagedAttention of the rewritten `model` sees, in the model's order; 0: all."""
    windows = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "PagedAttentionExtension":
            value = node.input_value(_WINDOW_INPUT)
            result = ov.Tensor(value.get_element_type(), ov.Shape([]))
            if not ov.Model([value], []).evaluate([result], []):
                raise ArtifactError(
                    "expected a fixed attention window, got one that depends on the text; not supported"
                )
            windows.append(int(result.data))
    return windows


def attention_window(model: ov.Model) -> int | None:
    """The smallest window of all layers, or None where every layer sees the whole text."""
    return min((window for window in attention_windows(model) if window > 0), default=None)


def restrict_logits(model: ov.Model) -> ov.Model:
    """Add the input `logit_rows` [R]: only these rows go through the LM head, so that a prompt pays for none."""
    logits = next((port for port in model.outputs if "logits" in port.get_names()), None)
    hidden = next((port for port in model.outputs if FEATURES_OUTPUT in port.get_names()), None)
    if logits is None or hidden is None:
        raise ArtifactError(
            f"expected an IR with the results logits and {FEATURES_OUTPUT}; export it with dovetail-export model"
        )
    head = logits.node.input_value(0).get_node()
    while head.get_type_name() in _BEHIND_HEAD:
        head = head.input_value(0).get_node()
    assert head.get_type_name() == "MatMul", f"a matrix product makes the logits, not {head.get_type_name()}"
    features = head.input_value(0)
    rows = ov.op.Parameter(ov.Type.i64, ov.PartialShape([-1]))
    rows.set_friendly_name(LOGIT_ROWS)
    rows.output(0).get_tensor().set_names({LOGIT_ROWS})
    gather = ov.opset13.gather(features, rows, ov.op.Constant(np.array(0, np.int64)))
    head.input(0).replace_source_output(gather.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()
    return model
