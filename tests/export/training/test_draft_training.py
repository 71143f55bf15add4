"""Proves that the draft is trained on what it meets at run time: unrolled training is the run time's own sequence of
calls, its loss is the cross-entropy it says, and a few steps on real features beat an untrained draft.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from oracles.torch_drafts import drafted_target

from dovetail.export.commands.cli import dovetail_export
from dovetail.export.convert.torch_model import body_and_head, load_torch
from dovetail.export.draft.config import block_sizes
from dovetail.export.draft.layouts import read_draft
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.training import draft as draft_training
from dovetail.export.training.draft import DraftRecipe, DraftTask, soft_cross_entropy, unroll
from dovetail.export.training.draft_model import DraftModel, join, load_draft
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


def test_soft_cross_entropy() -> None:
    torch.manual_seed(0)
    head, guess, p = torch.randn(50, 8), torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 50).softmax(-1)
    ours = soft_cross_entropy(guess @ head.T, guess, p @ head)
    theirs = torch.nn.functional.cross_entropy((guess @ head.T).flatten(0, 1), p.flatten(0, 1))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, guess, retain_graph=True)[0] for loss in (ours, theirs)))


def test_cached_features_are_the_targets(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = load_torch(tiny_checkpoint)
    ids = np.random.default_rng(0).integers(0, 512, 1000).astype(np.int32)
    path = tmp_path / "features.bin"
    source = draft_training.cached(target, ids, path, window=128)
    starts = np.array([128, 256])
    windows = torch.from_numpy(ids[starts[:, None] + np.arange(100)].astype(np.int64))
    live = draft_training.on_the_fly(target)(starts, windows)
    assert (source(starts, windows) - live).abs().max() < 0.1  # bfloat16 and float16
    assert source(starts + 300, windows).shape == (2, 100, 64)
    changed = path.stat().st_mtime_ns
    again = draft_training.cached(target, ids, path, window=128)
    assert path.stat().st_mtime_ns == changed, "a finished cache is computed once"
    assert torch.equal(again(starts, windows), source(starts, windows))


@pytest.mark.parametrize("kind", ["dgf", "eagle", "eagle3"])
def test_training_helps(kind: str, tiny_checkpoint: Path) -> None:
    """On text whose next token depends on the last alone; `eagle3` learns no features."""
    target = load_torch(tiny_checkpoint).requires_grad_(False)
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, 512, 40), 100).astype(np.int32)[rng.permutation(4000)]
    recipe = DraftRecipe(
        kind=kind, windows=4, window=32, unroll=2, soft_weight=1.0, vocab=400 if kind == "eagle3" else None
    )
    torch.manual_seed(0)
    fresh = draft_training.new_draft(target, block_sizes(read_checkpoint(tiny_checkpoint)), recipe, ids, "")
    live = draft_training.on_the_fly(target, fresh.config.feature_layers)
    task = DraftTask(fresh, body_and_head(target)[2], recipe, ids, ids[:700], live, live)
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
        "--feature-cache",
        str(tmp_path / "cache"),
        "--json",
    ]
    result = CliRunner().invoke(dovetail_export, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert len(report["agreement"]) == draft_training.AGREEMENT_DEPTHS
    _, embedding, lm_head = body_and_head(load_torch(tiny_checkpoint))
    assert load_draft(tmp_path / "draft", embedding, lm_head).config.num_layers == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [], "work is tidied up"


@pytest.mark.parametrize(("kind", "extra"), [("eagle", []), ("eagle3", ["--vocab", "100"])])
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
    assert (draft.head_tokens is None) == (kind == "eagle")
    assert kind == "eagle" or len(draft.lm_head) == 100


def test_recipe_is_checked() -> None:
    with pytest.raises(UserError, match="`kind` dgf, eagle, eagle3, got 'medusa'"):
        DraftRecipe(kind="medusa")
    with pytest.raises(UserError, match="`vocab` with `kind` eagle3"):
        DraftRecipe(vocab=100)
    with pytest.raises(UserError, match="at least four times"):
        DraftRecipe(window=8, unroll=3)
    assert dataclasses.replace(DraftRecipe(), unroll=1).unroll == 1
