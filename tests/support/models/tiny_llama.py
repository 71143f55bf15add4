"""Random models small enough to export in a second."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def write_checkpoint(folder: Path, *, seed: int = 0, vocab_size: int = 512, hidden_size: int = 64) -> Path:
    """A random Llama with a real byte-level tokenizer, and weights wide enough that its logits are far from flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dovetail.export.quiet import quiet_torch
    from dovetail.export.training import corpus
    from dovetail.export.training.target import save_target

    texts = [
        Path(sysconfig.get_path("stdlib"), name).read_text(encoding="utf-8") for name in ("ast.py", "json/decoder.py")
    ]
    tokenizer = corpus.train_tokenizer(texts, vocab_size)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.15,
    )
    with quiet_torch():
        save_target(LlamaForCausalLM(config), tokenizer, folder)
    return folder


def write_draft(folder: Path, checkpoint: Path, *, seed: int = 1, blocks: int = 2) -> Path:
    """A random draft for a checkpoint."""
    import torch

    from dovetail.export.convert.torch_model import body_and_head, load_torch
    from dovetail.export.draft.config import block_sizes, config_for
    from dovetail.export.sources.checkpoint import read_checkpoint
    from dovetail.export.training.draft_model import DraftModel, save_draft

    _, embedding, lm_head = body_and_head(load_torch(checkpoint))
    torch.manual_seed(seed)
    draft = DraftModel(config_for(block_sizes(read_checkpoint(checkpoint)), blocks), embedding, lm_head)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(5 if parameter.ndim == 2 else 1)
    save_draft(draft, folder)
    return folder
