"""Train a small language model with a demo target's tokenizer, on the same text: the assistant of the peers in
`dovetail bench`, and a draft of kind `lm`. Not a test: run it by hand; a stopped run goes on.

Usage: python tests/tools/train_assistant.py TARGET OUT [MINUTES]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from dovetail.export.training import corpus
from dovetail.export.training.loop import Pace, train
from dovetail.export.training.target import CONTEXT_LENGTH, TargetTask, save_target


def main() -> None:
    target, out = Path(sys.argv[1]), Path(sys.argv[2])
    minutes = float(sys.argv[3]) if len(sys.argv) > 3 else 12.0
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    text = corpus.standard_library()
    ids, held_out = (corpus.encode(tokenizer, list(part.values())) for part in (text.train, text.held_out))
    config = LlamaConfig(
        hidden_size=192,
        num_hidden_layers=2,
        intermediate_size=512,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    task = TargetTask(model, ids, held_out, corpus.bytes_per_token(text.held_out.values(), len(held_out)), seed=0)
    print(train(task, Pace(minutes), out.with_name(f".{out.name}.pt"))[-1])
    save_target(model.eval(), tokenizer, out)


if __name__ == "__main__":
    main()
