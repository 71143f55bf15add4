"""The export held against torch on held-out text: what compression and conversion changed, in numbers.

Letters: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from dovetail.export.checkpoint import body_and_head
from dovetail.export.corpus import held_out_samples
from dovetail.export.draft_model import DraftModel
from dovetail.export.draft_onnx import example_call, run_torch
from dovetail.runtime.errors import UserError
from dovetail.runtime.manifest import DRAFT_MODEL, TARGET_MODEL, TOKENIZER, ExportChecks
from numpy.typing import NDArray
from tokenizers import Tokenizer

TOKENS = 2048
WINDOW = 512
_MIN_TOKENS = 16


def compare(folder: Path, model: Any, draft: DraftModel | None, text: str | None = None) -> ExportChecks:
    """Compare the artifact under construction in `folder` with the torch `model` and `draft`, both float32.

    The target: mean KL divergence (torch's distribution to the artifact's, nats a token) and the share of equal
    argmaxes, with OpenVINO's arithmetic in float32, so that the figure is the artifact's own. The draft: the share
    of equal first children, by ONNX Runtime on the CPU.
    """
    ids = _token_ids(folder, text)
    window = min(WINDOW, model.config.max_position_embeddings)
    divergence, equal, compared = 0.0, 0, 0
    request = _compiled(folder / TARGET_MODEL).create_infer_request()
    agreement: float | None = None
    body = body_and_head(model)[0] if draft is not None else None
    for start in range(0, len(ids) - _MIN_TOKENS + 1, window):
        part = ids[start : start + window]
        with torch.no_grad():
            theirs = torch.log_softmax(
                model(input_ids=torch.from_numpy(part)[None], use_cache=False).logits[0].float(), -1
            )
        request.reset_state()
        ours = torch.log_softmax(torch.from_numpy(_logits(request, part)), -1)  # [T, V]
        divergence += float((theirs.exp() * (theirs - ours)).sum())
        equal += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        compared += len(part)
        if draft is not None and body is not None and agreement is None:
            with torch.no_grad():
                features = body(input_ids=torch.from_numpy(part)[None], use_cache=False).last_hidden_state[0]
            agreement = _draft_agreement(folder / DRAFT_MODEL, draft, part, features)
    return ExportChecks(
        tokens=compared,
        target_kl_mean=divergence / compared,
        target_argmax_agreement=equal / compared,
        draft_argmax_agreement=agreement,
    )


def _token_ids(folder: Path, text: str | None) -> NDArray[np.int64]:
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    if text is None:
        ids: list[int] = []
        for document in held_out_samples():
            ids += tokenizer.encode(document[:4000]).ids
            if len(ids) >= TOKENS:
                break
    else:
        ids = tokenizer.encode(text).ids
    if len(ids) < _MIN_TOKENS:
        raise UserError(
            f"expected a check text of at least {_MIN_TOKENS} tokens, got {len(ids)}; give a longer --check-text"
        )
    return np.asarray(ids[:TOKENS], np.int64)


def _compiled(path: Path) -> Any:
    import openvino as ov

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
        "ENABLE_MMAP": "NO",
    }
    return ov.Core().compile_model(path, "CPU", settings)


def _logits(request: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[T] -> [T, V] float32 by the stateful IR, from an empty cache."""
    length = len(ids)
    feeds = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    wanted = {name for port in request.model_inputs for name in port.get_names()}
    request.infer({name: value for name, value in feeds.items() if name in wanted})
    return np.array(request.get_tensor("logits").data[0], np.float32)


def _draft_agreement(path: Path, draft: DraftModel, ids: NDArray[np.int64], features: torch.Tensor) -> float:
    """The share of real pairs whose first child by the graph is torch's, read in one call."""
    import onnxruntime as ort

    pairs = len(ids) - 1
    call = example_call(draft, pairs, past=0)
    call |= {"input_ids": ids[1:], "features": features[:pairs].half().numpy(), "logit_rows": np.arange(pairs)}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (children,) = session.run(["top_token_ids"], call)  # [T, K]
    _, log_probs = run_torch(draft, call)
    return float((children[:, 0] == log_probs.argmax(-1)).mean())
