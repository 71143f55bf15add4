"""Random drafts of every kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from models.tiny_llama import write_draft
from transformers import LlamaConfig, LlamaForCausalLM

from dovetail.export.convert.torch_model import body_and_head, load_torch
from dovetail.export.draft.config import block_sizes
from dovetail.export.draft.kinds import KINDS
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.training.draft_model import DraftModel, save_draft


def random_draft(checkpoint: Path, **variant: Any) -> DraftModel:
    """Of a kind, with weights wide enough that its logits are far from flat, and norms and biases that do something."""
    _, embedding, lm_head = body_and_head(load_torch(checkpoint))
    kind, blocks = variant.pop("kind"), variant.pop("num_layers", 1)
    config = KINDS[kind].config_for(block_sizes(read_checkpoint(checkpoint)), blocks, **variant)
    tokens = None if config.head_size is None else torch.arange(0, 2 * config.head_size, 2)
    torch.manual_seed(3)
    draft = DraftModel(config, embedding, lm_head if tokens is None else lm_head[tokens], tokens)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.ndim == 2 and name != "lm_head":
                parameter.mul_(6)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return draft.eval()


def write_kind(folder: Path, checkpoint: Path, kind: str) -> Path:
    """A draft folder of `kind` for `checkpoint`; of `lm` a small checkpoint with the same tokenizer."""
    if kind == "lm":
        torch.manual_seed(4)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, initializer_range=0.3)).save_pretrained(folder)
        shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    elif kind == "dgf":
        write_draft(folder, checkpoint)
    else:
        save_draft(random_draft(checkpoint, kind=kind), folder)
    return folder
