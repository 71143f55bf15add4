"""Proves that the export's own figure for a draft, how often its rounded weights have the same first child as float32
ones, is that: 1 for what is not rounded, less for what is, and near chance for a graph with other weights; and that
nothing of the comparison stays.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from models.draft_kinds import random_draft
from numpy.typing import NDArray
from oracles.torch_drafts import weights_of

from dovetail.export.draft.onnx_graph import export_draft
from dovetail.export.draft.weights import DraftWeights
from dovetail.export.draft.writing import draft_agreement

IDS = np.random.default_rng(0).integers(0, 512, 400)


@pytest.fixture(scope="module", params=["dgf", "eagle3", "lm"])
def draft(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> DraftWeights:
    return weights_of(random_draft(tiny_checkpoint, kind=request.param))


def features(ids: NDArray[np.int64], layers: tuple[int, ...]) -> NDArray[np.float32]:
    """Random ones, of which the last may not be read: no pair has it."""
    made = np.random.default_rng(1).standard_normal((len(ids), (len(layers) + 1) * 64), dtype=np.float32)
    made[-1] = np.nan
    return made


def test_agreement(draft: DraftWeights, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shares = {}
    for weight_format in ("float32", "int8", "int4"):
        export_draft(draft, path, weight_format=weight_format)  # type: ignore[arg-type]
        shares[weight_format] = draft_agreement(path, draft, IDS, features)
    assert shares["float32"] == 1
    assert 0.9 < shares["int8"] <= 1
    assert 0.5 < shares["int4"] < 1
    other = dataclasses.replace(draft, lm_head=np.ascontiguousarray(draft.lm_head[::-1]))
    assert draft_agreement(path, other, IDS, features) < 0.1
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_features_beyond_float16(draft: DraftWeights, tmp_path: Path) -> None:
    """They are cut off, as at run time, without a warning."""
    export_draft(draft, tmp_path / "model.onnx")
    huge = draft_agreement(tmp_path / "model.onnx", draft, IDS, lambda ids, layers: 1e6 * features(ids, layers))
    assert 0 <= huge <= 1
