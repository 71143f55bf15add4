"""Proves plain decoding in `exact` numerics against programs that nobody here wrote: transformers' greedy `generate`
on a float32 export, and OpenVINO GenAI on the INT8 export. Where a token differs, the two best logits must be a
near-tie, so that a bug can't hide behind rounding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.genai import genai_greedy
from oracles.ties import COUNT, assert_same_or_tied
from transformers import AutoModelForCausalLM

from dovetail.runtime import load
from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.pipeline import Pipeline


def plain(pipe: Pipeline, prompt: list[int]) -> list[int]:
    return pipe.generate(prompt, temperature=0, max_new_tokens=COUNT, ignore_eos=True).token_ids


def prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, vocab_size, int(n)).tolist() for n in (1, 2, 7, 40, 150)]


def test_transformers_greedy(tiny_checkpoint: Path, tiny_artifact_fp32: Path) -> None:
    pipe = load(tiny_artifact_fp32, draft="none", numerics="exact", ctx_size=256)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all texts to their full length
    model.generation_config.pad_token_id = 0
    compared = 0
    for prompt in prompts(model.config.vocab_size):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False)
        compared += assert_same_or_tied(pipe, prompt, plain(pipe, prompt), out[0, len(prompt) :].tolist())
    assert compared > 4 * COUNT, "nearly all of the 5 texts must agree to their end"


@pytest.mark.parametrize("kind", ["tiny", "shipped"])
def test_openvino_genai_greedy(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(f"{kind}_artifact")
    pipe = load(path, draft="none", numerics="exact", ctx_size=256)
    artifact = open_artifact(path)
    exact = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    texts = prompts(artifact.manifest.target.vocab_size)
    answers = genai_greedy(artifact.file(TARGET_MODEL).parent, texts, COUNT, **exact)
    compared = sum(
        assert_same_or_tied(pipe, prompt, plain(pipe, prompt), theirs)
        for prompt, theirs in zip(texts, answers, strict=True)
    )
    assert compared > 4 * COUNT, "nearly all of the 5 texts must agree to their end"
