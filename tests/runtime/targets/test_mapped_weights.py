"""Proves that the target's weights are in memory once: pages of the file go back while the first pass reads them and
after it, and read the same if they are wanted again.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import numpy as np
import pytest

from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import ArtifactError
from dovetail.runtime.targets.base import Step, read
from dovetail.runtime.targets.openvino.engine import OpenVinoTarget
from dovetail.runtime.targets.openvino.mapped_weights import MappedWeights
from dovetail.runtime.trees.tree import root_only


def resident(path: Path) -> int:
    """Bytes of `path` that this process has in memory, over all its mappings; -1 where there is none."""
    found, inside = -1, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *rest = line.split(maxsplit=5)
        if "-" in name:
            inside = rest[-1:] == [str(path.resolve())]
            found = max(found, 0) if inside else found
        elif inside and name == "Rss:":
            found += 1024 * int(rest[0])
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(np.random.default_rng(0).bytes(4 << 20))
    return path


def test_pages_that_were_read_go_back_while_others_are_read(file: Path) -> None:
    weights = MappedWeights(file)
    with weights.read_once():
        assert weights.tensor.data.sum() == np.fromfile(file, np.uint8).sum()
        waiting = time.monotonic() + 30
        while resident(file) and time.monotonic() < waiting:
            time.sleep(0.01)
        assert resident(file) == 0
        weights.tensor.data.sum()
    assert resident(file) == 0


def test_without_it_they_stay_and_dropped_pages_read_the_same(file: Path) -> None:
    weights = MappedWeights(file)
    before = weights.tensor.data.copy()
    assert resident(file) == file.stat().st_size
    weights.drop()
    assert resident(file) == 0
    np.testing.assert_array_equal(weights.tensor.data, before)


def test_a_loaded_target_has_its_weights_once(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    path = artifact.file(TARGET_MODEL)
    file = path.with_suffix(".bin")
    target = OpenVinoTarget(path, artifact.manifest.target, numerics="fast", threads=2, capacity=512)
    sequence = target.sequence()
    read(target, sequence, np.arange(300))  # in chunks: the LM head is used by the last alone
    assert resident(file) == 0
    step = Step(sequence, root_only(7))
    expected = target.forward([step])[0].logits.copy()
    embedding = artifact.manifest.target.vocab_size * artifact.manifest.target.hidden_size  # looked up in the file
    assert resident(file) <= embedding + 16 * mmap.PAGESIZE  # what the kernel reads around it, too
    np.testing.assert_array_equal(target.forward([step])[0].logits, expected)


def test_a_file_that_cannot_be_mapped_is_a_damaged_artifact(tmp_path: Path) -> None:
    empty = tmp_path / "weights.bin"
    for _ in ("absent", "empty"):
        with pytest.raises(ArtifactError, match=r"expected a file of weights, got: .*; export again"):
            MappedWeights(empty)
        empty.touch()
