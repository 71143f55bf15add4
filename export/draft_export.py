"""A draft folder -> the draft of an artifact: read for its target, reduced, written as a graph, and held against torch.

Letters: B sequences, T tokens, D hidden size, K children.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dovetail.export.checkpoint import body_and_head
from dovetail.export.draft_features import Taps, target_features
from dovetail.export.draft_graph import WeightFormat
from dovetail.export.draft_layouts import Target, read_draft
from dovetail.export.draft_model import DraftModel
from dovetail.export.draft_onnx import TOP_K, example_call, export_draft, run_torch
from dovetail.export.draft_vocabulary import draft_vocabulary
from dovetail.runtime.manifest import DraftInfo
from numpy.typing import NDArray

COMPARED_TOKENS = 512


@dataclasses.dataclass(frozen=True, slots=True)
class DraftPlan:
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


def write_draft(plan: DraftPlan, source: Path, path: Path, model: Any, ids: NDArray[np.int64]) -> ExportedDraft:
    """Write the plan's draft to `path`, for the torch `model` of the checkpoint `source`; `ids` are held-out text.

    Raises `UserError` if the draft is not one for this target.
    """
    _, embedding, lm_head = body_and_head(model)
    draft = read_draft(plan.folder, Target(source, model.config, embedding, lm_head), allow_pickle=plan.allow_pickle)
    if plan.vocab is not None:
        draft.keep_tokens(torch.from_numpy(draft_vocabulary(source, plan.vocab, plan.vocab_texts)))
    top_k = min(TOP_K, len(draft.lm_head))
    path.parent.mkdir(exist_ok=True)
    export_draft(draft, path, top_k=top_k, weight_format=plan.weight_format)
    config = draft.config
    info = DraftInfo(
        kind=config.kind,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        top_k=top_k,
        parameters=draft.num_parameters(),
        precision=plan.weight_format,
        head_size=None if draft.head_tokens is None else len(draft.head_tokens),
    )
    taps = Taps(config.feature_layers, draft.state_dict()["projection.weight"]) if config.feature_layers else None
    return ExportedDraft(info, draft_agreement(path, draft, ids, model), taps)


def draft_agreement(path: Path, draft: DraftModel, ids: NDArray[np.int64], model: Any) -> float:
    """The share of real pairs whose first child by the graph at `path` is the torch `draft`'s, read in one call. The
    features are the torch target `model`'s.
    """
    import onnxruntime as ort

    ids = ids[: min(COMPARED_TOKENS, model.config.max_position_embeddings)]
    pairs = len(ids) - 1
    call = example_call(draft, pairs, past=0)
    call |= {"input_ids": ids[1:], "logit_rows": np.arange(pairs)}
    if draft.config.kind != "lm":
        with torch.no_grad():
            features = target_features(model, torch.from_numpy(ids)[None], draft.config.feature_layers)[0]
            fed = features[:, : -draft.config.hidden_size] if draft.config.feature_layers else features
            call["features"] = draft.project(fed)[:pairs].half().numpy()  # [T, D]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (children,) = session.run(["top_token_ids"], call)  # [T, K]
    _, log_probs = run_torch(draft, call)
    return float((children[:, 0] == log_probs.argmax(-1)).mean())
