"""Proves the whole way of a real model, as a user goes it: SmolLM2-135M-Instruct's GGUF file by the command to an
artifact, and a chat with that to the answer that transformers gives with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
import transformers
from click.testing import CliRunner
from oracles.ties import COUNT, assert_same_or_tied
from real_models import gemma3_gguf, smollm2_gguf
from side_by_side import compare

from dovetail.export.commands.cli import dovetail_export
from dovetail.export.sources.finding import find_source
from dovetail.runtime import load
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.pipeline import Pipeline

QUESTIONS = ("What is the capital of France?", "Write a haiku about the sea.", "Explain why the sky is blue.")


class RealModel:
    """A GGUF file, the artifact that the command makes of it, and transformers' model with the file's numbers."""

    def __init__(self, path: Path, out: Path, config: Any, model: Any, draft: Path | None = None) -> None:
        self.path, self.artifact = path, out
        options = [] if draft is None else ["--draft", str(draft)]
        done = CliRunner().invoke(dovetail_export, ["model", str(path), "-o", str(out), *options])
        assert done.exit_code == 0, done.output
        source = find_source(path)
        self.torch = model(config(**source.config)).eval()
        tensors = {name: torch.from_numpy(tensor.read()) for name, tensor in source.tensors.items()}
        missing, strange = self.torch.load_state_dict(tensors, strict=False)
        assert (missing, strange) == (["lm_head.weight"], [])  # tied
        self.torch.tie_weights()
        self.torch.generation_config.eos_token_id = None  # all texts to their full length
        self.torch.generation_config.pad_token_id = 0

    def greedy(self, prompt: list[int]) -> list[int]:
        """What transformers writes behind `prompt`."""
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = self.torch.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    out = tmp_path_factory.mktemp("real") / "smollm2"
    draft = demo.DRAFT
    return RealModel(smollm2_gguf(), out, transformers.LlamaConfig, transformers.LlamaForCausalLM, draft)


@pytest.fixture(scope="module")
def artifact(smollm2: RealModel) -> Path:
    return smollm2.artifact


@pytest.fixture(scope="module")
def plain(artifact: Path) -> Iterator[Pipeline]:
    """In the default numerics."""
    with load(artifact, draft="none", ctx_size=512) as pipe:
        yield pipe


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


def test_a_chat_s_answer_is_transformers(smollm2: RealModel, plain: Pipeline) -> None:
    prompts = [plain.encode([{"role": "user", "content": question}]) for question in QUESTIONS]
    theirs = [smollm2.greedy(prompt) for prompt in prompts]
    with load(smollm2.artifact, draft="none", numerics="exact", ctx_size=512) as pipe:
        ours = pipe.generate(prompts, temperature=0, max_new_tokens=COUNT, ignore_eos=True)
        pairs = zip(prompts, [text.token_ids for text in ours], theirs, strict=True)
        compared = sum(assert_same_or_tied(pipe, *pair) for pair in pairs)
        assert compared > 2 * COUNT, "nearly all of the 3 texts must agree to their end"
        answer = pipe.generate([{"role": "user", "content": QUESTIONS[0]}], temperature=0, max_new_tokens=32)
        assert "Paris" in answer.text
        assert answer.finish_reason == "stop"


@pytest.mark.gemma
def test_gemma_s_answer_is_transformers(tmp_path: Path) -> None:
    """Sliding and full layers, 262,144 tokens, blocks of four kinds; Q6_K becomes 8 bits, so that answers may part."""
    made = RealModel(gemma3_gguf(), tmp_path / "gemma3", transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM)
    checks = open_artifact(made.artifact).manifest.checks
    assert checks.target_kl_mean is not None
    assert checks.target_kl_mean < 1e-3
    with load(made.artifact, draft="none", numerics="exact", ctx_size=512) as pipe:
        prompt = pipe.encode("The capital of France is")  # the file has no chat template
        ours = pipe.generate(prompt, temperature=0, max_new_tokens=COUNT, ignore_eos=True).token_ids
        assert ours[:8] == made.greedy(prompt)[:8]


def test_drafts_leave_the_text_as_it_is(artifact: Path, plain: Pipeline) -> None:
    """In the default numerics, with matches in the text and in shared passes, answers are those of plain decoding."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    controls = {"temperature": 0.8, "seed": 1, "max_new_tokens": 48}
    with load(artifact, draft="lookup", ctx_size=512) as pipe:
        drafted = pipe.generate(chats, **controls)
    assert [text.token_ids for text in drafted] == [plain.generate(chat, **controls).token_ids for chat in chats]


def test_the_draft_that_ships_saves_passes(artifact: Path) -> None:
    with load(artifact, draft="artifact", ctx_size=512, profile=None) as pipe:
        prompts = [[{"role": "user", "content": question}] for question in demo.QUESTIONS]
        comparisons = compare(pipe, prompts, demo.TEMPERATURES, max_new_tokens=32, seconds=0)
    for one in comparisons:
        assert one.same
        assert one.ours.tokens_per_pass > 1.2


def test_a_download_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    whole = smollm2_gguf().read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    done = CliRunner().invoke(dovetail_export, ["model", str(tmp_path / "cut.gguf"), "-o", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert not (tmp_path / "out").exists()
    assert str(tmp_path / "cut.gguf") in str(done.exception)
