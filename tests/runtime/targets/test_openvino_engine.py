"""Proves what is the OpenVINO engine's own, beyond the laws in tests/laws/test_target_engines.py: INT8 weights keep a
node apart from its siblings, too; fast numerics stay near exact; passes of any sizes in any order find their inputs in
memory that is used again; forks share pages until one of them writes; the cache keeps to the memory there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.numpy_target import NumpyTarget
from traces.random_trees import path_to_root

from dovetail.runtime.artifact.manifest import TARGET_MODEL, TargetInfo
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import ArtifactError, ContextOverflowError, PassAbandonedError
from dovetail.runtime.targets.base import Numerics, Step, read
from dovetail.runtime.targets.openvino import engine
from dovetail.runtime.targets.openvino.engine import OpenVinoTarget
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, chain, root_only

TOLERANCE = 2e-5  # float32 sums in another order, logits of about 10
AGREEMENT = 1e-4  # with the numpy engine


def files(path: Path) -> tuple[Path, TargetInfo]:
    artifact = open_artifact(path)
    return artifact.file(TARGET_MODEL), artifact.manifest.target


def load(
    path: Path, numerics: Numerics = "exact", *, capacity: int = 2048, at_most: int | None = None
) -> OpenVinoTarget:
    return OpenVinoTarget(*files(path), numerics=numerics, threads=2, capacity=capacity, at_most=at_most)


@pytest.fixture(scope="module")
def target(tiny_artifact: Path) -> Iterator[OpenVinoTarget]:
    loaded = load(tiny_artifact)
    yield loaded
    assert loaded.free == loaded.capacity, "a test leaked pages"


def random_tokens(target: OpenVinoTarget, rng: np.random.Generator, count: int) -> Int64s:
    return rng.integers(0, target.info.vocab_size, count)


def random_tree(target: OpenVinoTarget, rng: np.random.Generator, size: int) -> Tree:
    parents = np.array([-1, *(int(rng.integers(0, i)) for i in range(1, size))])
    return Tree(random_tokens(target, rng, size), parents)


def next_logits(target: OpenVinoTarget, text: Int64s) -> Float32s:
    """[V] after `text`, from a fresh sequence."""
    sequence = target.sequence()
    read(target, sequence, text[:-1])
    out = target.forward([Step(sequence, root_only(int(text[-1])))])[0]
    logits: Float32s = out.logits[0].copy()
    sequence.close()
    return logits


def test_a_node_is_its_path_alone_in_int8(target: OpenVinoTarget) -> None:
    rng = np.random.default_rng(1)
    past, tree = random_tokens(target, rng, 50), random_tree(target, rng, 24)
    sequence = target.sequence()
    read(target, sequence, past)
    logits = target.forward([Step(sequence, tree)])[0].logits.copy()
    sequence.close()
    for node in range(len(tree)):
        path = tree.tokens[path_to_root(tree, node)[::-1]]
        np.testing.assert_allclose(logits[node], next_logits(target, np.concatenate([past, path])), atol=TOLERANCE)


def test_fast_numerics_stay_near_exact(target: OpenVinoTarget, tiny_artifact: Path) -> None:
    text = random_tokens(target, np.random.default_rng(4), 60)
    exact = next_logits(target, text)
    fast = next_logits(load(tiny_artifact, "fast"), text)
    assert 0 < np.abs(fast - exact).max() < 0.1 * np.abs(exact).max()


def test_passes_of_any_sizes_in_any_order(tiny_artifact_fp32: Path, tiny_checkpoint: Path) -> None:
    """Inputs outgrow their first memory and come back to it: of tokens (600), of masks (40 * 40), of sequences."""
    target, rng = load(tiny_artifact_fp32), np.random.default_rng(5)
    oracle = NumpyTarget.from_checkpoint(tiny_checkpoint, capacity=target.capacity)
    short, long = chain(random_tokens(target, rng, 3)), chain(random_tokens(target, rng, 600))
    bush, wide = random_tree(target, rng, 5), random_tree(target, rng, 40)
    passes = [[short], [long], [short], [bush], [wide], [bush], [root_only(1)], [short, wide, bush], [long, bush]]
    passes += [[root_only(token) for token in range(40)], [short], [long, short], [wide]]
    for trees in passes:
        sequences = [target.sequence() for _ in trees]
        outs = target.forward([*map(Step, sequences, trees)])
        expected = oracle.forward([Step(oracle.sequence(), tree) for tree in trees])
        for got, right in zip(outs, expected, strict=True):
            np.testing.assert_allclose(got.logits, right.logits, atol=AGREEMENT)
            np.testing.assert_allclose(got.features, right.features, atol=AGREEMENT)
        for sequence in sequences:
            sequence.close()
        oracle.free = oracle.capacity


def test_more_sizes_than_are_remembered(target: OpenVinoTarget) -> None:
    text = random_tokens(target, np.random.default_rng(6), 270)
    sequence = target.sequence()
    expected = target.forward([Step(sequence, chain(text))])[0].logits.copy()
    for size in [*range(1, 271), 7, 270, 1]:
        out = target.forward([Step(sequence, chain(text[:size]), [size - 1])])[0]
        np.testing.assert_allclose(out.logits[0], expected[size - 1], atol=TOLERANCE)
    sequence.close()


def test_forks_share_pages_until_one_of_them_writes(target: OpenVinoTarget) -> None:
    page = target.pool.page_size
    first = target.sequence()
    read(target, first, random_tokens(target, np.random.default_rng(7), 2 * page + 5))
    assert target.capacity - target.free == 3 * page
    second, third = first.fork(), first.fork()
    assert target.capacity - target.free == 3 * page
    read(target, second, np.array([1]))
    assert target.capacity - target.free == 4 * page, "its own last page"
    first.close()
    read(target, third, np.array([1]))
    assert target.capacity - target.free == 4 * page, "nobody else holds the page any more"
    second.truncate(page)
    third.close()
    assert target.capacity - target.free == page
    second.close()


def test_a_cache_that_fits_no_memory_is_refused(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = load(tiny_artifact).cache.nbytes
    monkeypatch.setattr(engine, "available_memory", lambda: size)
    load(tiny_artifact)
    monkeypatch.setattr(engine, "available_memory", lambda: size - 1)
    with pytest.raises(ContextOverflowError, match=r"expected memory for a cache of .* \(2048 tokens\), got .*; lower"):
        load(tiny_artifact)


@pytest.mark.parametrize(("at_most", "capacity"), [(None, 64), (32, 64), (100, 128), (320, 320), (2048, 320)])
def test_a_cache_grows_into_a_quarter_of_the_free_memory(
    at_most: int | None, capacity: int, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_of_320 = load(tiny_artifact, capacity=320).cache.nbytes
    monkeypatch.setattr(engine, "available_memory", lambda: 4 * bytes_of_320)
    assert load(tiny_artifact, capacity=64, at_most=at_most).capacity == capacity


@pytest.mark.parametrize("sizes", [{"vocab_size": 511}, {"hidden_size": 32}, {"num_layers": 3}])
def test_an_ir_of_other_sizes_than_the_manifest_says_is_refused(tiny_artifact: Path, sizes: dict[str, Any]) -> None:
    path, info = files(tiny_artifact)
    with pytest.raises(ArtifactError, match=r"expected \d layers and the widths .*, got 2 and .*; export the artifact"):
        OpenVinoTarget(path, dataclasses.replace(info, **sizes), numerics="fast", threads=2, capacity=64)


def test_a_pass_that_is_abandoned_is_as_if_it_had_not_been(shipped_artifact: Path) -> None:
    """Its rows are computed again, with the same bits; without a pass there is nothing to end."""
    target = OpenVinoTarget(*files(shipped_artifact), numerics="fast", threads=2, capacity=2048)
    tokens = np.random.default_rng(0).integers(0, target.info.vocab_size, 1800)

    def last_row() -> Float32s:
        with contextlib.closing(target.sequence()) as sequence:
            sequence.reserve(len(tokens))
            return target.forward([Step(sequence, chain(tokens), [len(tokens) - 1], is_prompt=True)])[0].logits.copy()

    def is_abandoned() -> bool:
        is_over = threading.Event()

        def ask() -> None:
            while not is_over.wait(0.01):
                target.abandon()

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            last_row()
        except PassAbandonedError:
            return True
        finally:
            is_over.set()
            asking.join()
        return False

    expected = last_row()
    assert any(is_abandoned() for _ in range(20)), "no pass could be ended"
    target.abandon()
    assert np.array_equal(last_row(), expected)
    assert target.free == target.capacity
    target.close()
