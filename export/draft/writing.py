"""A draft folder -> the draft of an artifact: read for its target, reduced, written as a graph, and held against torch.

Letters: B sequences, T tokens, D hidden size, K children.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.export.draft.graph_builder import WeightFormat
from dovetail.export.draft.layouts import read_draft
from dovetail.export.draft.model import DraftModel
from dovetail.export.draft.onnx_graph import example_call, export_draft, run_torch
from dovetail.export.draft.published import DraftedTarget
from dovetail.export.draft.target_features import Taps
from dovetail.export.draft.vocabulary import draft_vocabulary
from dovetail.runtime.artifact.manifest import DraftInfo

COMPARED_TOKENS = 512

# The target's: ids [T] and feature layers -> their inputs side by side and the last hidden state, [T, (L + 1) * D]
Features = Callable[[NDArray[np.int64], tuple[int, ...]], NDArray[np.float32]]


@dataclasses.dataclass(frozen=True, slots=True)
class DraftSettings:
    """The draft folder to export, and how; see `write_artifact`."""

    folder: Path
    weight_format: WeightFormat
    vocab: int | None
    vocab_texts: tuple[Path, ...]
    allow_pickle: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ExportedDraft:
    """What was written, the share of first children on which graph and torch agree, and what the target's graph must
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
    draft = read_draft(settings.folder, target, allow_pickle=settings.allow_pickle)
    if settings.vocab is not None:
        draft.keep_tokens(torch.from_numpy(draft_vocabulary(target.source, settings.vocab, settings.vocab_texts)))
    path.parent.mkdir(exist_ok=True)
    info = export_draft(draft, path, weight_format=settings.weight_format)
    config = draft.config
    taps = Taps(config.feature_layers, draft.state_dict()["projection.weight"]) if config.feature_layers else None
    ids = ids[: min(COMPARED_TOKENS, target.config.max_position_embeddings)]
    return ExportedDraft(info, draft_agreement(path, draft, ids, features), taps)


def draft_agreement(path: Path, draft: DraftModel, ids: NDArray[np.int64], features: Features) -> float:
    """The share of real pairs whose first child by the graph at `path` is the torch `draft`'s, read in one call, with
    the target's `features`.
    """
    import onnxruntime as ort

    pairs = len(ids) - 1
    call = example_call(draft, pairs, past=0)
    call |= {"input_ids": ids[1:], "logit_rows": np.arange(pairs)}
    if draft.kind.reads_features:
        with torch.no_grad():
            read = torch.from_numpy(features(ids, draft.config.feature_layers))
            fed = read[:, : -draft.config.hidden_size] if draft.config.feature_layers else read
            call["features"] = draft.project(fed)[:pairs].half().numpy()  # [T, D]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (children,) = session.run(["top_token_ids"], call)  # [T, K]
    _, log_probs = run_torch(draft, call)
    return float((children[:, 0] == log_probs.argmax(-1)).mean())
