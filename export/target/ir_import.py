"""A target from a graph that somebody else made: checked, its hidden states named, its weights as they are."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.export.sources.base import Source
from dovetail.export.sources.ir_folder import IR_MODEL
from dovetail.export.target.ir_graph import add_features_result, check_decoder, check_windows, paged_windows, width
from dovetail.export.target.ir_weights import stored_format, weight_elements
from dovetail.runtime.artifact.manifest import FEATURES_OUTPUT, TARGET_MODEL, TargetInfo
from dovetail.runtime.errors import ArtifactError, UserError

if TYPE_CHECKING:
    from dovetail.export.draft.target_features import Taps

_log = logging.getLogger(__name__)


def import_target(source: Source, folder: Path, taps: Taps | None = None) -> TargetInfo:
    """Write the target of the artifact in `folder` from an IR: the weights stay as they are, and its tokenizers for
    OpenVINO GenAI come along. With `taps` the hidden states are what those compute, not the last ones.

    Raises `UserError` if it is not a stateful causal decoder that OpenVINO's paged attention carries.
    """
    model = read_source_ir(source.path)
    windows = checked_windows(model, source.config)
    parameters, weight_format = weight_elements(model).total(), stored_format(model)
    for output in model.outputs:
        if FEATURES_OUTPUT in output.get_names():  # what an earlier draft was fed, which may be something else
            model.remove_result(output.get_node())
    if taps is not None:
        model = taps.add(model)
    info = save_target(model, folder, source.config, windows, parameters, weight_format)
    del model
    gc.collect()
    for stem in ("openvino_tokenizer", "openvino_detokenizer"):
        for path in (source.path / f"{stem}.xml", source.path / f"{stem}.bin"):
            if path.is_file():
                shutil.copyfile(path, folder / "target" / path.name)
    return info


def read_source_ir(source: Path) -> Any:
    """The decoder whose IR is in the folder `source`. Raises `UserError` if it is not one that we can run."""
    from dovetail.runtime.targets.openvino.ir import read_ir

    try:
        model = read_ir(source / IR_MODEL)
    except ArtifactError as error:
        raise UserError(str(error)) from None
    check_decoder(model, source)
    for port in model.inputs:  # the rewriting to paged attention goes by the nodes' names, which others may choose
        port.get_node().set_friendly_name(port.get_any_name())
    return model


def checked_windows(model: Any, config: Mapping[str, Any]) -> list[int]:
    """How many tokens each layer sees, 0: all. Raises `UserError` unless they are those of `config`."""
    windows = paged_windows(model)
    check_windows(windows, config, config["max_position_embeddings"])
    return windows


def save_target(
    model: Any, folder: Path, config: Mapping[str, Any], windows: Sequence[int], parameters: int, weight_format: str
) -> TargetInfo:
    """Tap the hidden states, write the model, and say what it is."""
    import openvino as ov

    model = add_features_result(model)
    (folder / TARGET_MODEL).parent.mkdir(exist_ok=True)
    ov.save_model(model, folder / TARGET_MODEL, compress_to_fp16=False)
    return TargetInfo(
        architecture=config["model_type"],
        hidden_size=width(model, FEATURES_OUTPUT),
        num_layers=len(windows),
        vocab_size=width(model, "logits"),
        context_length=_context_length(config),
        parameters=parameters,
        weight_format=weight_format,
        sliding_window=min((window for window in windows if window), default=None),
    )


def _context_length(config: Mapping[str, Any]) -> int:
    """In tokens. Where rotary frequencies are others in a longer text (longrope), this graph would mix both in a text
    that grows: it ends before.
    """
    context: int = config["max_position_embeddings"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    border = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if (rope.get("rope_type") or rope.get("type")) != "longrope" or border is None or border >= context:
        return context
    _log.warning(f"target: texts up to {border} tokens, not {context}: this graph has no longrope that is read anew")
    return int(border)
