"""Proves the whole way of a real model, as a user goes it: SmolLM2-135M-Instruct's GGUF file by the command to an
artifact, and a chat with that to the answer that transformers gives with the same weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from real_models import smollm2_gguf
from ties import COUNT, assert_same_or_tied
from transformers import LlamaConfig, LlamaForCausalLM

from dovetail.export.commands.cli import dovetail_export
from dovetail.export.sources.finding import find_source
from dovetail.runtime import load
from dovetail.runtime.artifact.opening import open_artifact

QUESTIONS = ("What is the capital of France?", "Write a haiku about the sea.", "Explain why the sky is blue.")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "smollm2"
    done = CliRunner().invoke(dovetail_export, ["model", str(smollm2_gguf()), "-o", str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def by_torch() -> Any:
    """transformers' model with the numbers that the file holds."""
    source = find_source(smollm2_gguf())
    model = LlamaForCausalLM(LlamaConfig(**source.config)).eval()
    tensors = {name: torch.from_numpy(tensor.read()) for name, tensor in source.tensors.items()}
    missing, strange = model.load_state_dict(tensors, strict=False)
    assert (missing, strange) == (["lm_head.weight"], [])  # tied
    model.tie_weights()
    model.generation_config.eos_token_id = None  # all texts to their full length
    model.generation_config.pad_token_id = 0
    return model


def test_weights_are_taken_as_they_are(artifact: Path) -> None:
    manifest = open_artifact(artifact).manifest
    assert manifest.target.weight_format == "keep"
    assert set(manifest.target.weight_forms or {}) == {"Q4_1", "Q8_0"}
    assert manifest.checks.target_kl_mean is not None
    assert manifest.checks.target_kl_mean < 1e-8
    assert manifest.checks.target_argmax_agreement == 1
    assert manifest.checks.fast_kl_mean is not None
    assert manifest.checks.fast_kl_mean < 0.02
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    assert sizes["target/openvino_model.bin"] < 120e6, "4 bits a weight, and their scales and offsets"


def test_a_chat_s_answer_is_transformers(artifact: Path, by_torch: Any) -> None:
    compared = 0
    with load(artifact, draft="none", numerics="exact", ctx_size=512) as pipe:
        for question in QUESTIONS:
            prompt = pipe.encode([{"role": "user", "content": question}])
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = by_torch.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False)
            ours = pipe.generate(prompt, temperature=0, max_new_tokens=COUNT, ignore_eos=True).token_ids
            compared += assert_same_or_tied(pipe, prompt, ours, out[0, len(prompt) :].tolist())
        assert compared > 2 * COUNT, "nearly all of the 3 texts must agree to their end"
        answer = pipe.generate([{"role": "user", "content": QUESTIONS[0]}], temperature=0, max_new_tokens=32)
        assert "Paris" in answer.text
        assert answer.finish_reason == "stop"


def test_drafts_leave_the_text_as_it_is(artifact: Path) -> None:
    """In the default numerics, with matches in the text, the answers are those of plain decoding."""
    texts = []
    for draft in ("none", "lookup"):
        with load(artifact, draft=draft, ctx_size=512) as pipe:
            texts.append(
                [
                    pipe.generate(
                        [{"role": "user", "content": question}], temperature=0.8, seed=1, max_new_tokens=48
                    ).token_ids
                    for question in QUESTIONS
                ]
            )
    assert texts[0] == texts[1]


def test_the_file_of_a_model_in_parts_is_named(tmp_path: Path) -> None:
    """A file that is cut short, as a download that was stopped leaves it, is refused in one line."""
    whole = smollm2_gguf().read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    done = CliRunner().invoke(dovetail_export, ["model", str(tmp_path / "cut.gguf"), "-o", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert not (tmp_path / "out").exists()
    assert json.dumps(str(tmp_path / "cut.gguf"))[1:-1] in str(done.exception)
