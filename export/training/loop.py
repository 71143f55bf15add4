"""What every training run here shares: time budget, learning rate, batches of windows, checkpoints, resuming, progress.

A stage is resumed by running the same command again: the checkpoint holds the weights, both optimizers, the order of
the data, the random generator and the seconds spent. Letters: N tokens, B windows, T positions.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dovetail.export.artifact.atomic_file import replacing
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.cpu import computes_bfloat16
from dovetail.runtime.terminal.progress import stage

_log = logging.getLogger(__name__)

WARMUP_STEPS = 30
DECAY_FROM = 0.3  # of the stage: constant until here, then linearly down
FLOOR = 0.02


class TrainingStoppedError(Exception):
    """SIGTERM or SIGINT arrived; the checkpoint is written and the same command goes on from it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; run the same command to go on")
        self.exit_code = 128 + signal_number


class Task(Protocol):
    """What is trained: the loop below asks for one loss per step and, now and then, for the held-out figures."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizers(self) -> list[torch.optim.Optimizer]: ...
    def loss(self, fraction: float) -> Tensor:
        """The loss of the next batch, `fraction` of the stage being done."""

    def held_out(self) -> dict[str, float]:
        """Figures on text that is never trained on; the first is the one shown on the bar."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """How long, and how often to write the checkpoint and to look at held-out text."""

    minutes: float
    checkpoint_seconds: float = 60.0
    held_out_seconds: float = 240.0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise UserError(f"expected minutes above 0, got {self.minutes:g}; give the time the stage may take")


def fast_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively (over twice the speed here), else float32: emulation is slower than
    float32.
    """
    return torch.bfloat16 if computes_bfloat16() else torch.float32


def keep_freed_memory() -> None:
    """Tell glibc not to return large blocks to the kernel: a training step's activations are the same every step (a
    fifth of its time).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def learning_rate_scale(step: int, fraction: float) -> float:
    """The factor on every optimizer's peak rate after `step` steps of this stage, `fraction` of its time gone."""
    decay = 1.0 if fraction < DECAY_FROM else max(FLOOR, (1 - fraction) / (1 - DECAY_FROM))
    return min(1.0, (step + 1) / WARMUP_STEPS) * decay


class Windows:
    """Endless windows of a token stream, each epoch in a new order and from a new offset, without replacement within an
    epoch.
    """

    def __init__(self, tokens: NDArray[np.int32], seed: int) -> None:
        self._tokens = tokens  # [N]
        self._seed, self._epoch, self._cursor, self._length = seed, -1, 0, 0
        self._starts: NDArray[np.int64] = np.zeros(0, np.int64)

    def next(self, count: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(starts [B], windows [B, T + 1]): one more token than positions, so that inputs and goals both come from a
        row.
        """
        if length != self._length or self._cursor + count > len(self._starts):
            self._begin_epoch(self._epoch + 1, length)
        if count > len(self._starts):
            raise UserError(
                f"expected at least {count * (length + 1)} tokens of text, got {len(self._tokens)}; give more text"
            )
        starts = self._starts[self._cursor : self._cursor + count]
        self._cursor += count
        return starts, self._tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)

    def _begin_epoch(self, epoch: int, length: int) -> None:
        rng = np.random.default_rng((self._seed, epoch))
        slack = len(self._tokens) - (length + 1)
        starts = np.arange(rng.integers(0, length), max(0, slack) + 1, length) if slack >= 0 else np.zeros(0, np.int64)
        self._epoch, self._cursor, self._length, self._starts = epoch, 0, length, rng.permutation(starts)

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on with the next unseen window."""
        return {"seed": self._seed, "epoch": self._epoch, "cursor": self._cursor, "length": self._length}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where the other left off."""
        self._seed = state["seed"]
        if state["epoch"] >= 0:
            self._begin_epoch(state["epoch"], state["length"])
        self._cursor = state["cursor"]


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGTERM or SIGINT, instead of the process dying by it."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda n, _frame: received.append(n))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    task: Task, pace: Pace, checkpoint: Path, clock: Callable[[], float] = time.monotonic
) -> list[dict[str, float]]:
    """Train until the minutes are spent; returns the held-out figures over time, the last ones at the end.

    Goes on from `checkpoint` if it exists, and leaves its last state there. Raises `TrainingStoppedError` after SIGTERM
    or SIGINT.
    """
    step, spent, history = _load(task, checkpoint)
    budget = pace.minutes * 60
    peaks = [[group.setdefault("peak_lr", group["lr"]) for group in o.param_groups] for o in task.optimizers]
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    if history and spent >= budget:
        return history
    last = clock()
    saved_at = looked_at = spent
    smooth = None
    with _stop_signals() as stopped, stage(task.name) as bar:
        while spent < budget and not stopped:
            fraction = spent / budget
            scale = learning_rate_scale(step, fraction)
            for optimizer, rates in zip(task.optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = peak * scale
            loss = task.loss(fraction)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's stubs
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in task.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            value = loss.item()
            smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            now = clock()
            spent, last = spent + now - last, now
            if spent - looked_at >= pace.held_out_seconds:
                history.append(_look(task, step, spent))
                looked_at = spent
            if spent - saved_at >= pace.checkpoint_seconds:
                _save(task, checkpoint, step, spent, history)
                saved_at = spent
            bar.update(spent / budget, f"step {step}, loss {smooth:.3f}" + _figures(history))
        if not stopped:
            history.append(_look(task, step, spent))
            bar.update(1.0, f"step {step}" + _figures(history))
    _save(task, checkpoint, step, spent, history)
    if stopped:
        raise TrainingStoppedError(stopped[0])
    return history


def _look(task: Task, step: int, spent: float) -> dict[str, float]:
    task.model.eval()
    with torch.no_grad():
        figures = task.held_out()
    task.model.train()
    entry = {"step": float(step), "minutes": spent / 60, **figures}
    _log.info(
        f"{task.name}: held out after {spent / 60:.1f} min, step {step}: "
        + ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
    )
    return entry


def _figures(history: list[dict[str, float]]) -> str:
    if not history:
        return ""
    name = next(k for k in history[-1] if k not in ("step", "minutes"))
    return f", {name} {history[-1][name]:.4g}"


def _save(task: Task, checkpoint: Path, step: int, spent: float, history: list[dict[str, float]]) -> None:
    state = {
        "model": dict(task.model.state_dict().items()),
        "optimizers": [optimizer.state_dict() for optimizer in task.optimizers],
        "task": task.state_dict(),
        "step": step,
        "seconds": spent,
        "history": history,
    }
    try:
        with replacing(checkpoint) as path:
            torch.save(state, path)
    except OSError as error:
        raise UserError(
            f"expected room for the checkpoint {checkpoint.name}, got: {error.strerror}; free some space and run the "
            f"same command"
        ) from None


def _load(task: Task, checkpoint: Path) -> tuple[int, float, list[dict[str, float]]]:
    if not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        return 0, 0.0, []
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    try:
        task.model.load_state_dict(state["model"])
        for optimizer, saved in zip(task.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        task.load_state_dict(state["task"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"expected the settings that the run in {checkpoint} was begun with, got others "
            f"({str(error).splitlines()[0]:.80}); give those, or another `work` folder"
        ) from None
    _log.info(
        f"{task.name}: going on from {checkpoint.name} after {state['seconds'] / 60:.1f} min, step {state['step']}"
    )
    return state["step"], state["seconds"], state["history"]
