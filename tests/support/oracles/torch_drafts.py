"""A draft as torch module and as arrays: what its graph is held against.

Letters: T pairs in a call, R rows wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.export.convert.torch_model import body_and_head, load_torch
from dovetail.export.draft.onnx_graph import draft_info
from dovetail.export.draft.published import DraftedTarget
from dovetail.export.draft.weights import DraftWeights
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.training.draft_model import DraftModel
from dovetail.runtime.drafts.graph_contract import cache_names


def drafted_target(checkpoint: Path) -> DraftedTarget:
    """The target of a draft, by its checkpoint."""
    embedding, lm_head = (weight.numpy() for weight in body_and_head(load_torch(checkpoint))[1:])
    return DraftedTarget(read_checkpoint(checkpoint), embedding, lm_head)


def weights_of(draft: DraftModel) -> DraftWeights:
    """The same draft as arrays."""
    tensors = {name: tensor.detach().float().numpy() for name, tensor in draft.named_parameters() if name != "lm_head"}
    embedding, lm_head = (tensor.detach().float().numpy() for tensor in (draft.embedding, draft.lm_head))
    tokens = None if draft.head_tokens is None else draft.head_tokens.numpy()
    return DraftWeights(draft.config, tensors, embedding, lm_head, tokens)


def run_torch(draft: DraftModel, call: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(hidden_states [R, D], log-probabilities [R, V]) of a call by the torch module in float32; -inf for tokens that
    its LM head does not have.

    The call's own rows are the last of its caches.
    """
    config, length = draft.config, len(call["input_ids"])
    values = {name: torch.from_numpy(array) for name, array in call.items()}
    past = len(values["key_cache.0"]) - length
    under = values["tree_mask"].shape[1]
    mask = torch.cat([torch.ones(length, past + length - under, dtype=torch.bool), values["tree_mask"]], dim=1)
    shape = (past, config.num_kv_heads, config.head_dim)
    names = cache_names(draft_info(weights_of(draft)))
    flat = [values[name][:past].reshape(shape).permute(1, 0, 2)[None] for name in names]
    features = values["features"].float()[values["feature_rows"]][None] if draft.kind.reads_features else None
    with torch.no_grad():
        hidden, _ = draft.float()(
            values["input_ids"][None],
            features,
            values["position_ids"],
            mask,
            list(zip(flat[::2], flat[1::2], strict=True)),
        )
        rows = hidden[0][values["logit_rows"]]
        log_probs = torch.log_softmax(draft.logits(rows), -1)
        if draft.head_tokens is not None:
            everywhere = torch.full((len(rows), config.vocab_size), -torch.inf)
            log_probs = everywhere.index_copy(1, draft.head_tokens, log_probs)
        return rows.numpy(), log_probs.numpy()
