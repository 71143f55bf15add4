"""How much quantisation changed a target: its distributions beside those of the same target with float weights, on
given text, without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dovetail.runtime.artifact.manifest import MANIFEST_NAME, TARGET_MODEL, TARGET_WEIGHTS, TargetInfo
from dovetail.runtime.artifact.opening import Artifact, open_artifact
from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.likelihood import Divergence, chunks, log_probs
from dovetail.runtime.targets.base import Numerics
from dovetail.runtime.targets.openvino.engine import OpenVinoTarget

WINDOW = 256
MAX_TOKENS = 8192
_ENOUGH = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Quality:
    """Over `tokens` predictions. KL in nats per token, from the reference to the quantised target; what begins with
    `fast` with activations in 8 bits, too, which is how a target is run by default.
    """

    tokens: int
    window: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p99: float
    argmax_agreement: float
    fast_perplexity: float
    fast_kl_mean: float
    fast_kl_p99: float
    fast_argmax_agreement: float


def compare_targets(
    artifact: Artifact,
    reference: Path,
    tokens: Sequence[int],
    *,
    threads: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Quality:
    """Read `tokens` in windows with the artifact's target and with `reference`, an artifact or an IR (`.xml`) of the
    same model. Both compute in float32, so that only the weights differ; the target also in `fast`. Raises
    `UserError` for a text too short or a reference that is another model.
    """
    info = artifact.manifest.target
    window = min(WINDOW, info.context_length)
    tokens = tokens[:MAX_TOKENS]
    if len(tokens) < _ENOUGH:
        raise UserError(
            f"text: expected at least {_ENOUGH} tokens to compare on, got {len(tokens)}; give a longer text"
        )
    own, other = _files(artifact), _reference(reference, info)
    ways: list[tuple[_Files, Numerics]] = [(own, "exact"), (own, "fast"), (other, "exact")]
    ours, fast, theirs = (
        OpenVinoTarget(path, described, numerics=numerics, threads=threads, capacity=2 * window, weights=weights)
        for (path, weights, described), numerics in ways
    )
    divergence, as_run = Divergence(), Divergence()
    for begin in range(0, len(tokens) - 1, window):
        part = np.array(tokens[begin : begin + window + 1], np.int64)
        rows = (log_probs(engine, part[:-1]) for engine in (ours, fast, theirs))
        for q, rounded, p, following in zip(*rows, chunks(part[1:], info.vocab_size), strict=True):
            divergence.add(q, p, following)
            as_run.add(rounded, p, following)
        progress(min((begin + window) / len(tokens), 1.0))
    return Quality(
        tokens=divergence.tokens,
        window=window,
        perplexity=divergence.perplexity,
        reference_perplexity=divergence.reference_perplexity,
        kl_mean=divergence.kl_mean,
        kl_p99=divergence.kl_p99,
        argmax_agreement=divergence.argmax_agreement,
        fast_perplexity=as_run.perplexity,
        fast_kl_mean=as_run.kl_mean,
        fast_kl_p99=as_run.kl_p99,
        fast_argmax_agreement=as_run.argmax_agreement,
    )


_Files = tuple[Path, Path, TargetInfo]
"""A target's graph, its weights, its sizes."""


def _files(artifact: Artifact) -> _Files:
    return artifact.file(TARGET_MODEL), artifact.file(TARGET_WEIGHTS), artifact.manifest.target


def _reference(path: Path, info: TargetInfo) -> _Files:
    """The IR to compare with, and its sizes. An artifact is verified like any other."""
    if (path / MANIFEST_NAME).exists():
        opened = open_artifact(path)
        if opened.manifest.target.vocab_size != info.vocab_size:
            raise UserError(
                f"reference {str(path)!r}: expected a vocabulary of {info.vocab_size}, got "
                f"{opened.manifest.target.vocab_size}; give the same model with float weights"
            )
        return _files(opened)
    model = path / "openvino_model.xml" if path.is_dir() else path
    if not model.is_file():
        raise UserError(f"reference {str(path)!r}: expected an artifact or an OpenVINO IR (.xml), got nothing there")
    return model, model.with_suffix(".bin"), info
