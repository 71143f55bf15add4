"""Runs the tests' tiny GGUF files in llama.cpp and their checkpoints in transformers, and prints how far their logits
are apart: so we know that the files which our reader is held against are what llama.cpp means by them. It ignores the
windows of Mistral and Phi-3, which is why only rows within them count there.

Usage: PYTHONPATH=tests/support python tests/tools/compare_gguf_with_llama_cpp.py (llama-cpp-python, extra `bench`)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from models import families, tiny_gguf, tiny_llama
from transformers import AutoModelForCausalLM

TOKENS = 100


def main() -> None:
    """All families."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer = tiny_llama.write_checkpoint(Path(name, "tokenizer")) / "tokenizer.json"
        for family in tiny_gguf.FAMILIES:
            checkpoint = families.write_family(Path(name, family), tokenizer, *tiny_gguf.FAMILIES[family])
            values, tensors = tiny_gguf.contents(checkpoint)
            if "gemma2.attn_logit_softcapping" in values:
                values["gemma2.attn_logit_softcapping"] = 1e6  # it has no way to say none
            path = tiny_gguf.write_gguf(Path(name, "model.gguf"), values, tensors)
            ids = np.random.default_rng(0).integers(1, families.VOCAB - 12, TOKENS).tolist()
            with torch.no_grad():
                model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
                ours = model(torch.tensor([ids])).logits[0].numpy()
            # type 0: keys and values as float32
            other = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, type_k=0, type_v=0)
            other.eval(ids)
            apart = np.abs(ours - np.array(other.scores[:TOKENS])).max(-1)
            within = apart[: families.WINDOW - 2]
            print(f"{family}: {apart.max():.1e} apart, within a window {within.max():.1e}, of {np.abs(ours).max():.2f}")


if __name__ == "__main__":
    main()
