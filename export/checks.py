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
from dovetail.export.draft_onnx import example_inputs, largest_difference
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
    argmaxes, with OpenVINO's arithmetic in float32, so that the figure is the artifact's own. The draft: the largest
    difference of any hidden state or log-probability.
    """
    ids = _token_ids(folder, text)
    window = min(WINDOW, model.config.max_position_embeddings)
    divergence, equal, compared = 0.0, 0, 0
    request = _compiled(folder / TARGET_MODEL).create_infer_request()
    largest: float | None = None
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
        if draft is not None and body is not None and largest is None:
            with torch.no_grad():
                features = body(input_ids=torch.from_numpy(part)[None], use_cache=False).last_hidden_state[0]
            largest = _draft_difference(folder / DRAFT_MODEL, draft, part, features)
    return ExportChecks(
        tokens=compared,
        target_kl_mean=divergence / compared,
        target_argmax_agreement=equal / compared,
        draft_max_difference=largest,
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


def _draft_difference(path: Path, draft: DraftModel, ids: NDArray[np.int64], features: torch.Tensor) -> float:
    """Over a real prefill, and over short calls behind the keys and values that torch makes of it."""
    pairs = len(ids) - 1
    tokens, halves = torch.from_numpy(ids[1:]), features[:pairs].half()
    with torch.no_grad():
        _, cache = draft(tokens[None], halves[None].float(), torch.arange(pairs))
    differences = []
    for past, length in ((0, 1), (0, min(64, pairs)), (pairs // 2, 4), (pairs - 8, 8)):
        case = example_inputs(draft, length, past)
        case["input_ids"], case["features"] = tokens[past : past + length], halves[past : past + length]
        for block, (keys, values) in enumerate(cache):
            case[f"past_key.{block}"] = keys[0, :, :past].permute(1, 0, 2).half().contiguous()
            case[f"past_value.{block}"] = values[0, :, :past].permute(1, 0, 2).half().contiguous()
        differences.append(largest_difference(draft, path, case))
    return max(differences)
