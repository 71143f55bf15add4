"""Proves that a reduced draft vocabulary is the most frequent tokens of a text (of an inflated pair: the same share of
the source's), that the graph then says those tokens alone with probabilities over them, also with 4-bit weights, and
that the words stay the target's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from oracles.torch_drafts import run_torch, weights_of
from tokenizers import Tokenizer

from dovetail.export.artifact.writing import write_artifact
from dovetail.export.commands.cli import dovetail_export
from dovetail.export.convert.torch_model import body_and_head, load_torch
from dovetail.export.draft.onnx_graph import example_call, export_draft
from dovetail.export.draft.vocabulary import draft_vocabulary, most_frequent
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.training.draft_model import DraftModel, as_module, load_draft
from dovetail.runtime import load
from dovetail.runtime.errors import UserError

TEXT = "def add(first, second):\n    return first + second\n" * 40


@pytest.fixture
def draft(tiny_checkpoint: Path, tiny_draft: Path) -> DraftModel:
    _, embedding, lm_head = body_and_head(load_torch(tiny_checkpoint))
    return load_draft(tiny_draft, embedding, lm_head)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Some documents: one of them is held out."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(TEXT + f"# {i}\n")
    return folder


def test_most_frequent() -> None:
    assert most_frequent(np.array([5, 0, 7, 5, 9, 0]), 3).tolist() == [0, 2, 4]
    assert most_frequent(np.array([1, 1, 1, 1]), 2).tolist() == [0, 1]


def test_the_texts_tokens_are_kept(tiny_checkpoint: Path, text: Path) -> None:
    tokens = draft_vocabulary(read_checkpoint(tiny_checkpoint), 64, [text])
    assert len(tokens) == 64
    assert (np.diff(tokens) > 0).all()
    used = set(Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json")).encode(TEXT).ids)
    assert used <= set(tokens.tolist())


def test_an_inflated_pair_keeps_the_same_share(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    small = draft_vocabulary(read_checkpoint(tiny_checkpoint), 64, [text])
    big = tmp_path / "big"
    shutil.copytree(tiny_checkpoint, big)
    config = json.loads((big / "config.json").read_text())
    (big / "config.json").write_text(json.dumps(config | {"vocab_size": 4096}))
    (big / "inflation.json").write_text(json.dumps({"source_shape": {"vocab_size": 512}}))
    tokens = draft_vocabulary(read_checkpoint(big), 512, [text])
    assert tokens[:64].tolist() == small.tolist()
    assert tokens[64:].tolist() == list(range(512, 512 + 448))


@pytest.mark.parametrize("size", [0, 63, 513])
def test_sizes_are_checked(tiny_checkpoint: Path, tiny_draft: Path, tmp_path: Path, size: int) -> None:
    arguments = ["model", str(tiny_checkpoint), "-o", str(tmp_path / "a"), "--draft", str(tiny_draft)]
    result = CliRunner().invoke(dovetail_export, [*arguments, "--draft-vocab", str(size)])
    assert isinstance(result.exception, UserError)
    assert f"--draft-vocab from 64 to the vocabulary's 512, got {size}" in str(result.exception)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("weight_format", ["float32", "int4"])
def test_the_graph_says_kept_tokens_alone(draft: DraftModel, weight_format: str, tmp_path: Path) -> None:
    kept = np.arange(3, 512, 5)
    reduced = weights_of(draft).with_head_of(kept)
    info = export_draft(reduced, tmp_path / "model.onnx", weight_format=weight_format)  # type: ignore[arg-type]
    call = example_call(info, 9, 20)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids, log_probs = session.run(["top_token_ids", "top_log_probs"], call)
    assert set(ids.ravel().tolist()) <= set(kept.tolist())
    _, expected = run_torch(as_module(reduced), call)  # [R, V]
    np.testing.assert_allclose(np.exp(expected).sum(-1), 1, atol=1e-5)
    assert np.isinf(expected[:, np.setdiff1d(np.arange(512), kept)]).all()
    if weight_format == "float32":
        assert (ids[:, :10] == np.argsort(-expected, axis=1)[:, :10]).all()
        np.testing.assert_allclose(log_probs, np.take_along_axis(expected, ids.astype(np.int64), 1), atol=3e-3)


def test_the_words_stay_the_targets(tiny_checkpoint: Path, tiny_draft: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    settings = {"weight_format": "fp32", "draft_weight_format": "int4", "draft_vocab": 64, "draft_vocab_texts": [text]}
    manifest = write_artifact(tiny_checkpoint, out, draft=tiny_draft, **settings)  # type: ignore[arg-type]
    assert manifest.draft is not None
    assert manifest.draft.precision == "int4"
    with load(out, numerics="exact", draft_device="cpu") as pipe, load(out, numerics="exact", draft="none") as plain:
        for prompt in ("def f(x):", "import os\n"):
            ours, theirs = (p.generate(prompt, max_new_tokens=24, temperature=0.0) for p in (pipe, plain))
            assert ours.token_ids == theirs.token_ids
            assert ours.totals.drafted_tokens > 0
