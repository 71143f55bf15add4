"""Proves that training stopped and gone on with is training that was never stopped, bit for bit, that a signal leaves a
checkpoint to go on from, and that the optimizer does what its paper says.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models.tiny_llama import write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from dovetail.export.artifact.atomic_file import replacing
from dovetail.export.training import loop as training
from dovetail.export.training import target as target_training
from dovetail.export.training.corpus import Corpus
from dovetail.export.training.loop import Pace, TrainingStoppedError, learning_rate_scale, train
from dovetail.export.training.muon import Muon, orthogonalise
from dovetail.export.training.target import TargetTask, train_target
from dovetail.runtime.errors import UserError

PLAN = ((0.5, 4, 16), (1.0, 2, 32))


def ticking(seconds: float = 1.0) -> Callable[[], float]:
    """A clock that moves by the same time at every look."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += seconds
        return now

    return clock


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Callable[[], TargetTask]:
    monkeypatch.setattr(target_training, "WINDOW_PLAN", PLAN)

    def build() -> TargetTask:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
        tokens = (np.arange(4000) * 7 // 3 % 32).astype(np.int32)
        return TargetTask(LlamaForCausalLM(config), tokens, tokens[:700], 1.0, seed=3)

    return build


def weights(task: TargetTask) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in task.model.parameters()])


def test_going_on_is_never_having_stopped(task: Callable[[], TargetTask], tmp_path: Path) -> None:
    pace = Pace(minutes=40 / 60, held_out_seconds=10)  # 40 steps of the ticking clock, across a change of windows
    straight = task()
    expected = train(straight, pace, tmp_path / "straight.pt", ticking())
    for stop_at in (7, 23):
        broken = task()
        count, plain_loss = 0, broken.loss

        def loss(
            fraction: float, plain_loss: Callable[[float], torch.Tensor] = plain_loss, stop_at: int = stop_at
        ) -> torch.Tensor:
            nonlocal count
            count += 1
            if count == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain_loss(fraction)

        broken.loss = loss  # type: ignore[method-assign]
        path = tmp_path / f"{stop_at}.pt"
        with pytest.raises(TrainingStoppedError, match="run the same command") as stopped:
            train(broken, pace, path, ticking())
        assert stopped.value.exit_code == 128 + signal.SIGTERM
        resumed = task()
        history = train(resumed, pace, path, ticking())
        assert torch.equal(weights(resumed), weights(straight))
        assert history[-1] == expected[-1]
    assert train(task(), pace, path, ticking()) == history, "a finished stage is not trained again"


def test_it_learns(task: Callable[[], TargetTask], tmp_path: Path) -> None:
    learner = task()
    before = learner.held_out()["bits_per_byte"]
    history = train(learner, Pace(1.0), tmp_path / "checkpoint.pt", ticking())
    assert history[-1]["bits_per_byte"] < 0.8 * before


def test_a_checkpoint_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with replacing(path) as beside:
        beside.write_text("good")
    with pytest.raises(OSError), replacing(path) as beside:  # noqa: PT011, PT012  # whatever the disk says, half way
        beside.write_text("ba")
        raise OSError
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_learning_rate() -> None:
    assert learning_rate_scale(0, 0.0) < 0.05
    assert learning_rate_scale(1000, 0.1) == 1.0
    assert learning_rate_scale(1000, 0.65) == pytest.approx(0.5)
    assert learning_rate_scale(1000, 1.0) == training.FLOOR


def test_warm_start_keeps_the_tokenizer_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_training, "WINDOW_PLAN", PLAN)
    monkeypatch.setattr(target_training, "CONTEXT_LENGTH", 128)
    source = write_checkpoint(tmp_path / "start")
    lines = [f"def f{i}(x):\n    return x + {i}\n" * 20 for i in range(8)]
    corpus = Corpus({str(i): text for i, text in enumerate(lines)}, {"held": "def g(y):\n    return y * 2\n" * 40})
    folder, report = train_target(
        corpus, tmp_path / "work", minutes=0.01, seed=0, warm_start=source, warm_start_minutes=82.0
    )
    assert (folder / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert report.warm_start_minutes == 82.0
    assert report.held_out_bits_per_byte > 0
    assert LlamaForCausalLM.from_pretrained(folder).config.vocab_size == 512


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 32, 32)])
def test_muon_orthogonalises(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrices))
    assert singular.max() < 1.3
    assert singular[:, : min(shape[1:]) // 2].min() > 0.6
    alone = torch.stack([orthogonalise(matrix[None])[0] for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone)


def test_muon_descends() -> None:
    torch.manual_seed(0)
    weight, goal = torch.nn.Parameter(torch.zeros(8, 12)), torch.randn(8, 12)
    optimizer = Muon([weight], lr=0.05)
    losses = []
    for _ in range(200):
        loss = (weight - goal).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_minutes_must_be_positive() -> None:
    with pytest.raises(UserError, match="minutes above 0"):
        Pace(0.0)
