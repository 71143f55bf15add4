"""A source -> `target/openvino_model.xml` and `.bin`, without torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov

from dovetail.export.sources.base import Source
from dovetail.export.sources.tensors import StoredTensor
from dovetail.export.target.ir_graph import paged_windows
from dovetail.export.target.native.decoder import Decoder
from dovetail.export.target.native.graph import build
from dovetail.export.target.native.scheme import Scheme
from dovetail.export.target.native.tensor_names import PROJECTION, tensor_shapes
from dovetail.export.target.native.weights import Constants, StoredWeights
from dovetail.runtime.artifact.manifest import TARGET_MODEL, TargetInfo

if TYPE_CHECKING:
    from dovetail.export.draft.target_features import Taps

_log = logging.getLogger(__name__)


def write_native_target(
    source: Source, decoder: Decoder, scheme: Scheme, folder: Path, weight_format: str, taps: Taps | None = None
) -> TargetInfo:
    """Write the target of the artifact in `folder`, its weights stored by `scheme`, and say what it is. With
    `taps` its hidden states are what those compute, not the last ones.
    """
    tensors: Mapping[str, StoredTensor] = source.tensors
    if taps is not None:
        matrix = taps.projection
        tensors = {**tensors, PROJECTION: StoredTensor(PROJECTION, matrix.shape, "F32", matrix, lambda raw, _: raw)}
    path = folder / TARGET_MODEL
    path.parent.mkdir(exist_ok=True)
    with Constants(folder / "weights") as constants:
        weights = StoredWeights(tensors, scheme, constants)
        model = build(decoder, weights, () if taps is None else taps.layers)
        expected = [layer.window or 0 for layer in decoder.layers]
        assert paged_windows(model) == expected, (
            "the rewriting to paged attention sees other windows than the decoder's"
        )
        ov.save_model(model, path, compress_to_fp16=False)
        del model
    for kind, count in weights.converted.items():
        _log.warning(f"target: {count / 1e6:.1f} M weights in {kind} blocks can't be taken as they are: now in 8 bits")
    return TargetInfo(
        architecture=decoder.family,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
        vocab_size=decoder.vocab_size,
        context_length=decoder.context_length,
        parameters=sum(int(np.prod(shape)) for shape in tensor_shapes(decoder).values()),
        weight_format=weight_format,
        sliding_window=min((layer.window for layer in decoder.layers if layer.window), default=None),
        weight_forms=dict(weights.forms),
        rope_border=decoder.rope_border,
    )
