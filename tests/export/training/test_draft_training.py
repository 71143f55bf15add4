"""Proves that the draft is trained on what it meets at run time: unrolled training is the run time's own sequence of
calls, its loss is the cross-entropy it says, and a few steps on real features beat an untrained draft.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from oracles.torch_drafts import drafted_target

from dovetail.export.artifact.source_models import source_model
from dovetail.export.commands.cli import dovetail_export
from dovetail.export.convert.torch_model import body_and_head, load_torch
from dovetail.export.draft.config import block_sizes
from dovetail.export.draft.layouts import read_draft
from dovetail.export.sources.finding import find_source
from dovetail.export.target.compression import Compression
from dovetail.export.training import draft as draft_training
from dovetail.export.training.draft import DraftRecipe, DraftTask, unroll
from dovetail.export.training.draft_model import DraftModel, join, load_draft
from dovetail.export.training.material import Material
from dovetail.export.training.target_record import TargetRecord, by_source, record
from dovetail.runtime.errors import UserError


@pytest.fixture(scope="module")
def draft(tiny_checkpoint: Path, tiny_draft: Path) -> DraftModel:
    _, embedding, lm_head = body_and_head(load_torch(tiny_checkpoint))
    return load_draft(tiny_draft, embedding, lm_head)


@torch.no_grad()
def test_unrolling_is_what_the_run_time_does(draft: DraftModel) -> None:
    """Depth d at pair p: prefill with the target's features up to p - d + 1, then d - 1 calls on the draft's own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (1, 12), generator=generator)
    features = torch.randn(1, 12, 64, generator=generator)
    unrolled = unroll(draft, ids, features, 4)
    for last_true in range(8):
        length = last_true + 1
        out, cache = draft(ids[:, :length], features[:, :length], torch.arange(length))
        torch.testing.assert_close(out[:, -1], unrolled[0][:, last_true], rtol=1e-4, atol=1e-5)
        for depth in range(2, 5):
            pair = last_true + depth - 1
            fed, token = out[:, -1:], ids[:, pair : pair + 1]
            mask = torch.ones(1, pair + 1, dtype=torch.bool)
            out, new = draft(token, fed, torch.tensor([pair]), mask, cache)
            cache = join([cache, new])
            torch.testing.assert_close(out[:, -1], unrolled[depth - 1][:, pair], rtol=1e-4, atol=1e-5)


def test_shifted_features_are_noticed(draft: DraftModel) -> None:
    """Each pair's output hangs on its own feature and on earlier ones, never on later ones."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (1, 6), generator=generator)
    features = torch.randn(1, 6, 64, generator=generator)
    with torch.no_grad():
        plain, _ = draft(ids, features, torch.arange(6))
        features[0, 3] += 1
        changed, _ = draft(ids, features, torch.arange(6))
    moved = (plain - changed).abs().amax(-1)[0] > 1e-3
    assert moved.tolist() == [False] * 3 + [True] * 3


def recorded(checkpoint: Path, ids: NDArray[np.int32], layers: Sequence[int], folder: Path) -> TargetRecord:
    model = source_model(find_source(checkpoint), Compression("int8"))
    reader = by_source(model, layers, model.embedding_and_head()[1])
    material = Material(ids, np.ones(len(ids), np.float32), (len(ids),))
    return record(material, reader, (len(layers) + 1) * 64, 512, folder, "reading")


@pytest.mark.parametrize("kind", ["dgf", "eagle", "eagle3"])
def test_training_helps(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On text whose next token depends on the last alone; `eagle3` learns no features."""
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, 512, 40), 100).astype(np.int32)[rng.permutation(4000)]
    recipe = DraftRecipe(
        kind=kind, windows=4, window=32, unroll=2, soft_weight=1.0, vocab=None if kind == "dgf" else 400
    )
    torch.manual_seed(0)
    source = find_source(tiny_checkpoint)
    matrices = source_model(source, Compression("int8")).embedding_and_head()
    tokens = None if recipe.vocab is None else list(range(recipe.vocab))
    fresh = draft_training.new_draft(*matrices, block_sizes(source), recipe, tokens, "")
    layers = fresh.config.feature_layers
    training = recorded(tiny_checkpoint, ids, layers, tmp_path / "training")
    task = DraftTask(fresh, recipe, training, recorded(tiny_checkpoint, ids[:700], layers, tmp_path / "held-out"))
    with torch.no_grad():
        before = task.held_out()
    for step in range(40):
        task.loss(step / 40).backward()  # type: ignore[no-untyped-call]
        for optimizer in task.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        after = task.held_out()
    assert kind == "eagle3" or after["smooth_l1"] < 0.9 * before["smooth_l1"]
    assert after["agreement_1"] > before["agreement_1"] + 0.01


def test_the_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x * {i}\n" * 60)
    arguments = ["draft", str(tiny_checkpoint), "-o", str(tmp_path / "draft"), "--text", str(text), "--minutes", "0.03"]
    arguments += [
        "--blocks",
        "1",
        "--window",
        "32",
        "--unroll",
        "2",
        "--json",
    ]
    result = CliRunner().invoke(dovetail_export, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert len(report["agreement"]) == draft_training.AGREEMENT_DEPTHS
    assert "Learnt from: 60 documents" in (tmp_path / "draft" / "README.md").read_text()
    _, embedding, lm_head = body_and_head(load_torch(tiny_checkpoint))
    assert load_draft(tmp_path / "draft", embedding, lm_head).config.num_layers == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [], "work is tidied up"


@pytest.mark.parametrize(
    ("kind", "extra"), [("eagle", []), ("dgf", ["--vocab", "100"]), ("eagle3", ["--vocab", "100"])]
)
def test_the_command_trains_other_kinds(kind: str, extra: list[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x * {i}\n" * 60)
    arguments = ["draft", str(tiny_checkpoint), "-o", str(tmp_path / "draft"), "--text", str(text), "--kind", kind]
    arguments += ["--minutes", "0.03", "--blocks", "1", "--window", "32", "--unroll", "2", *extra]
    result = CliRunner().invoke(dovetail_export, arguments)
    assert result.exit_code == 0, result.output
    draft = read_draft(tmp_path / "draft", drafted_target(tiny_checkpoint))
    assert draft.config.kind == kind
    assert (draft.head_tokens is None) == (not extra)
    assert not extra or len(draft.lm_head) == 100


def test_a_run_that_goes_on_keeps_its_tokens(tmp_path: Path) -> None:
    """What it learns from may have grown, and other tokens be the most frequent ones."""
    path = tmp_path / "work" / "head-tokens.json"
    before = draft_training._head_tokens(100, np.arange(512.0), path)
    assert before == list(range(412, 512))
    assert draft_training._head_tokens(100, -np.arange(512.0), path) == before
    assert draft_training._head_tokens(64, -np.arange(512.0), path) == list(range(64))
    assert draft_training._head_tokens(None, np.arange(512.0), path) is None


def test_another_recipe_does_not_go_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n" * 3000)
    (tmp_path / "b.txt").write_text("y = 2\n" * 3000)
    words = ["draft", str(tiny_checkpoint), "--text", str(tmp_path), "--minutes", "0.01", "--window", "32"]
    words += ["--work", str(tmp_path / "work"), "-o", str(tmp_path / "draft"), "--force", "--blocks"]
    assert CliRunner().invoke(dovetail_export, [*words, "1"]).exit_code == 0
    refused = CliRunner().invoke(dovetail_export, [*words, "2"])
    assert "expected the settings that the run in" in refused.output + str(refused.exception)


def test_recipe_is_checked() -> None:
    with pytest.raises(UserError, match="`kind` dgf, eagle, eagle3, got 'medusa'"):
        DraftRecipe(kind="medusa")
    with pytest.raises(UserError, match="at least four times"):
        DraftRecipe(window=8, unroll=3)
    assert dataclasses.replace(DraftRecipe(), unroll=1).unroll == 1
