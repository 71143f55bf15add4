"""Proves that the quality of a quantised target is what it says: zero against itself, transformers' perplexity for the
float reference, and a KL that agrees with one computed from whole rows.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dovetail.calibration.measure import quality
from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import UserError

TOKENS = np.random.default_rng(0).integers(1, 512, 400).tolist()


def test_against_itself_nothing_is_lost(tiny_artifact: Path) -> None:
    shares: list[float] = []
    found = quality.compare_targets(
        open_artifact(tiny_artifact), tiny_artifact, TOKENS, threads=1, progress=shares.append
    )
    assert found.tokens == 399
    assert found.kl_mean == pytest.approx(0, abs=1e-9)
    assert found.kl_p99 == pytest.approx(0, abs=1e-9)
    assert found.argmax_agreement == 1
    assert found.perplexity == pytest.approx(found.reference_perplexity)
    assert 0 < found.fast_kl_mean < 0.1, "activations in 8 bits are another matter"
    assert found.fast_kl_mean < found.fast_kl_p99
    assert shares[-1] == 1


def test_int8_against_float(tiny_artifact: Path, tiny_artifact_fp32: Path, tiny_checkpoint: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    opened = open_artifact(tiny_artifact)
    found = quality.compare_targets(opened, tiny_artifact_fp32, TOKENS, threads=1)
    assert 0 < found.kl_mean < 0.1
    assert found.kl_mean < found.kl_p99
    assert 0.8 < found.argmax_agreement < 1
    assert found.fast_kl_mean > found.kl_mean, "weights and activations together lose more than weights alone"
    assert 0.8 < found.fast_argmax_agreement < 1
    ir = open_artifact(tiny_artifact_fp32).file(TARGET_MODEL)
    assert quality.compare_targets(opened, ir, TOKENS, threads=1) == found
    assert quality.compare_targets(opened, ir.parent, TOKENS, threads=1) == found

    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    loss, count = 0.0, 0
    with torch.no_grad():
        for begin in range(0, len(TOKENS) - 1, quality.WINDOW):
            part = torch.tensor([TOKENS[begin : begin + quality.WINDOW + 1]])
            rows = model(part[:, :-1]).logits[0].log_softmax(-1)
            loss -= float(rows[torch.arange(len(rows)), part[0, 1:]].sum())
            count += len(rows)
    assert count == found.tokens
    assert found.reference_perplexity == pytest.approx(math.exp(loss / count), rel=1e-4)


def test_bad_input(tiny_artifact: Path, tmp_path: Path, shipped_artifact: Path) -> None:
    opened = open_artifact(tiny_artifact)
    with pytest.raises(UserError, match="expected at least 64 tokens"):
        quality.compare_targets(opened, tiny_artifact, TOKENS[:63], threads=1)
    with pytest.raises(UserError, match="expected an artifact or an OpenVINO IR"):
        quality.compare_targets(opened, tmp_path, TOKENS, threads=1)
    with pytest.raises(UserError, match="expected a vocabulary of 512, got 4096"):
        quality.compare_targets(opened, shipped_artifact, TOKENS, threads=1)
