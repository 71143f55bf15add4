"""How much quantisation changed a target: its distributions beside those of the same target with float weights, on
given text, without torch.

Letters: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from dovetail.runtime.artifact import Artifact, open_artifact
from dovetail.runtime.blocks import BlockTable
from dovetail.runtime.errors import UserError
from dovetail.runtime.feeds import SequenceStep
from dovetail.runtime.manifest import MANIFEST_NAME, TARGET_MODEL, TargetInfo
from dovetail.runtime.target import TargetModel

WINDOW = 256
MAX_TOKENS = 8192
_CHUNK = 64  # rows of logits at a time: a large vocabulary makes them large
_ENOUGH = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Quality:
    """Over `tokens` predictions. KL in nats per token, from the reference to the quantised target."""

    tokens: int
    window: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p99: float
    argmax_agreement: float


def compare_targets(
    artifact: Artifact,
    reference: Path,
    tokens: Sequence[int],
    *,
    threads: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Quality:
    """Read `tokens` in windows with the artifact's target and with `reference`, an artifact or an IR (`.xml`) of the
    same model. Both compute in float32, so that only the weights differ. Raises `UserError` for a text too short or a
    reference that is another model.
    """
    info = artifact.manifest.target
    window = min(WINDOW, info.context_length)
    tokens = tokens[:MAX_TOKENS]
    if len(tokens) < _ENOUGH:
        raise UserError(
            f"--text: expected at least {_ENOUGH} tokens to compare on, got {len(tokens)}; give a longer text"
        )
    ours, theirs = (
        TargetModel(path, described, numerics="exact", threads=threads, cache_tokens=window)
        for path, described in ((artifact.file(TARGET_MODEL), info), _reference(reference, info))
    )
    divergences: list[npt.NDArray[np.float64]] = []
    losses = [0.0, 0.0]
    agreed = count = 0
    for begin in range(0, len(tokens) - 1, window):
        part = np.array(tokens[begin : begin + window + 1], np.int64)
        for p, q, following in zip(_rows(theirs, part), _rows(ours, part), _chunks(part[1:]), strict=True):
            picked = np.arange(len(following)), following
            losses[0] -= float(q[picked].sum())
            losses[1] -= float(p[picked].sum())
            divergences.append((np.exp(p) * (p - q)).sum(axis=1))
            agreed += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            count += len(following)
        progress(min((begin + window) / len(tokens), 1.0))
    all_divergences = np.maximum(np.concatenate(divergences), 0)
    return Quality(
        tokens=count,
        window=window,
        perplexity=math.exp(losses[0] / count),
        reference_perplexity=math.exp(losses[1] / count),
        kl_mean=float(all_divergences.mean()),
        kl_p99=float(np.percentile(all_divergences, 99)),
        argmax_agreement=agreed / count,
    )


def _chunks(values: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return [values[i : i + _CHUNK] for i in range(0, len(values), _CHUNK)]


def _rows(model: TargetModel, part: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float64]]:
    """Log-probabilities [T, V] of what follows each token of `part` but the last, in chunks."""
    table, made = BlockTable(model.pool), []
    try:
        for chunk in _chunks(part[:-1]):
            positions = table.length + np.arange(len(chunk))
            out = model.forward([SequenceStep(table, chunk, positions, None, np.arange(len(chunk)))])[0]
            logits = out.logits.astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            made.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
            table.length += len(chunk)
    finally:
        table.release()
    return made


def _reference(path: Path, info: TargetInfo) -> tuple[Path, TargetInfo]:
    """The IR to compare with, and its sizes. An artifact is verified like any other."""
    if (path / MANIFEST_NAME).exists():
        opened = open_artifact(path)
        if opened.manifest.target.vocab_size != info.vocab_size:
            raise UserError(
                f"--reference {path}: expected a vocabulary of {info.vocab_size}, got "
                f"{opened.manifest.target.vocab_size}; give the same model with float weights"
            )
        return opened.file(TARGET_MODEL), opened.manifest.target
    model = path / "openvino_model.xml" if path.is_dir() else path
    if not model.is_file():
        raise UserError(f"--reference {path}: expected an artifact or an OpenVINO IR (.xml), got nothing there")
    return model, info
