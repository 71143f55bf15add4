"""A draft -> the draft of an artifact: read for its target, reduced, written as a graph, and what its weights' rounding
changed.

Letters: T tokens, D hidden size, K children.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.export.draft.graph_builder import WeightFormat
from dovetail.export.draft.layouts import read_draft
from dovetail.export.draft.onnx_graph import FLOAT16_MAX, example_call, export_draft
from dovetail.export.draft.published import DraftedTarget
from dovetail.export.draft.target_features import Taps
from dovetail.export.draft.vocabulary import draft_vocabulary
from dovetail.export.draft.weights import DraftWeights
from dovetail.runtime.artifact.manifest import DraftInfo

COMPARED_TOKENS = 512

# The target's: ids [T] and feature layers -> their inputs side by side and the last hidden state, [T, (L + 1) * D]
Features = Callable[[NDArray[np.int64], tuple[int, ...]], NDArray[np.float32]]


@dataclasses.dataclass(frozen=True, slots=True)
class DraftSettings:
    """The draft to export, a folder or a GGUF file, and how; see `write_artifact`."""

    path: Path
    weight_format: WeightFormat
    vocab: int | None
    vocab_texts: tuple[Path, ...]
    allow_pickle: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ExportedDraft:
    """What was written, the share of first children that its rounded weights leave, and what the target's graph must
    compute for it besides its last hidden state.
    """

    info: DraftInfo
    agreement: float
    taps: Taps | None


def write_draft(
    settings: DraftSettings, path: Path, target: DraftedTarget, features: Features, ids: NDArray[np.int64]
) -> ExportedDraft:
    """Write the draft to `path`, for the `target` that computes these `features`; `ids` are held-out text.

    Raises `UserError` if the draft is not one for this target.
    """
    draft = read_draft(settings.path, target, allow_pickle=settings.allow_pickle)
    if settings.vocab is not None:
        draft = draft.with_head_of(draft_vocabulary(target.source, settings.vocab, settings.vocab_texts))
    path.parent.mkdir(exist_ok=True)
    info = export_draft(draft, path, weight_format=settings.weight_format)
    layers = draft.config.feature_layers
    taps = Taps(layers, draft.tensors["projection.weight"]) if layers else None
    ids = ids[: min(COMPARED_TOKENS, target.context_length)]
    return ExportedDraft(info, draft_agreement(path, draft, ids, features), taps)


def draft_agreement(path: Path, draft: DraftWeights, ids: NDArray[np.int64], features: Features) -> float:
    """The share of real pairs, read in one call with the target's `features`, whose first child by the graph at `path`
    is the one by the same graph with float32 weights, which lies beside it meanwhile.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        exact = Path(scratch) / "exact.onnx"
        info = export_draft(draft, exact, weight_format="float32")
        pairs = len(ids) - 1
        call = example_call(info, pairs, past=0)
        call |= {"input_ids": ids[1:], "logit_rows": np.arange(pairs), "num_children": np.array([1])}
        if info.reads_features:
            read = features(ids, draft.config.feature_layers)[:pairs]
            if draft.config.feature_layers:
                read = read[:, : -info.hidden_size] @ draft.tensors["projection.weight"].T
            call["features"] = read.clip(-FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)  # [T, D]
        return float((_first_children(path, call) == _first_children(exact, call)).mean())


def _first_children(path: Path, call: dict[str, NDArray[Any]]) -> NDArray[np.int32]:
    """Of every pair of a call, by the graph at `path`.  # [T]"""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (children,) = session.run(["top_token_ids"], call)  # [T, K]
    first: NDArray[np.int32] = children[:, 0]
    return first
