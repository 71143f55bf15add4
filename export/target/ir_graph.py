"""Edits and readings of a target's OpenVINO graph: model in, model out, checked before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.runtime.artifact.manifest import FEATURES_OUTPUT
from dovetail.runtime.errors import ArtifactError, UserError

_BEHIND_HEAD = ("Convert", "Multiply", "Divide", "Tanh", "Add")  # between the LM head and logits: soft caps, a bias


def check_decoder(model: Any, where: object) -> None:
    """Raise `UserError` unless `model` is a stateful causal decoder: token ids in, logits out, its cache inside."""
    inputs = {name for port in model.inputs for name in port.get_names()}
    outputs = {name for port in model.outputs for name in port.get_names()}
    if "encoder_hidden_states" in inputs:
        raise UserError(f"expected a decoder-only model in {where}, got an encoder-decoder's; choose another model")
    if "logits" not in outputs:
        named = ", ".join(sorted(outputs)) or "none"
        raise UserError(
            f"expected an IR with the result logits in {where}, got {named}; export it for text generation "
            f"(embedding models have none)"
        )
    if "input_ids" not in inputs:
        raise UserError(
            f"expected an IR that reads input_ids in {where}, got {', '.join(sorted(inputs))}; export again"
        )
    if not model.get_sinks():
        raise UserError(
            f"expected a stateful IR in {where}, got one without its cache inside; export it with optimum-intel's "
            f"task text-generation-with-past"
        )


def lm_head(model: Any) -> Any:
    """The MatMul behind `logits`."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in _BEHIND_HEAD:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        raise UserError(
            f"expected a matrix product behind logits, got {node.get_type_name()}; this IR's hidden states can't be "
            f"tapped"
        )
    return node


def add_features_result(model: Any) -> Any:
    """The model with one more result, `hidden_states`: what the LM head reads, so after the final norm.
    [B, T, D] float32.
    """
    names = [name for output in model.outputs for name in output.get_names()]
    if FEATURES_OUTPUT in names:  # an IR that we made
        return model
    from openvino import opset13

    assert names.count("logits") == 1, f"expected one output named logits, got {names}"
    features = lm_head(model).input_value(0)
    shape = features.get_partial_shape()
    if shape.rank.get_length() != 3 or shape[2].is_dynamic:
        raise UserError(f"expected hidden states of shape [B, T, D] before the LM head, got {shape}; not supported")
    result = opset13.result(features, name=FEATURES_OUTPUT)
    result.output(0).get_tensor().set_names({FEATURES_OUTPUT})
    model.add_results([result])
    model.validate_nodes_and_infer_types()
    assert [n for o in model.outputs for n in o.get_names()].count(FEATURES_OUTPUT) == 1
    assert [n for o in model.outputs for n in o.get_names()].count("logits") == 1, (
        "naming the features renamed the logits"
    )
    return model


def width(model: Any, output: str) -> int:
    """The last dimension of a result."""
    last = model.output(output).get_partial_shape()[2]
    if last.is_dynamic:
        raise UserError(f"expected a fixed width of {output}, got a dynamic one; export the IR again")
    return int(last.get_length())


def paged_windows(model: Any) -> list[int]:
    """How many tokens each layer sees (0: all) once the attention is rewritten as the runtime does. `model` stays.

    Raises `UserError` with the reason where OpenVINO's paged attention does not carry the model.
    """
    from dovetail.runtime.targets.openvino.ir import attention_windows, to_paged_attention

    clone = model.clone()
    try:
        windows = attention_windows(to_paged_attention(clone))
    except (RuntimeError, AssertionError, ArtifactError) as error:
        raise _not_carried(" ".join(str(error).split())[:160]) from None
    left = sorted({node.get_type_name() for node in clone.get_ops()} & {"ReadValue", "ScaledDotProductAttention"})
    if left or not windows:
        raise _not_carried(f"{', '.join(left) or 'no attention'} left in the graph")
    return windows


def _not_carried(reason: str) -> UserError:
    return UserError(f"expected a model that OpenVINO's paged attention carries, got: {reason}; choose another model")


def check_windows(windows: Sequence[int], config: Mapping[str, Any], context: int) -> None:
    """Raise `UserError` unless the graph's attention `windows` are those of the model's `config.json`: a window that
    the rewriting missed would go unnoticed until a text outgrows it.
    """
    kinds = config.get("layer_types")
    foreign = set(kinds or ()) - {"full_attention", "sliding_attention"}
    if foreign:
        raise _not_carried(f"layers of {', '.join(sorted(foreign))}")
    wanted = config.get("sliding_window") if config.get("use_sliding_window") is not False else None
    wanted = 0 if wanted is None or wanted >= context else wanted
    bites = [0 if window >= context else window for window in windows]
    expected = [wanted if kind == "sliding_attention" else 0 for kind in kinds or ["sliding_attention"]]
    if (bites != expected) if kinds else (set(bites) - {0} != set(expected) - {0}):
        raise _not_carried(f"attention windows {_shown(bites)} where config.json has {_shown(expected)}")


def _shown(windows: Sequence[int]) -> str:
    return "none" if not any(windows) else f"{min(w for w in windows if w)} in {sum(map(bool, windows))} layers"
