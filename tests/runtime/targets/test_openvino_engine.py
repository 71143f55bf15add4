"""Proves the paged target in the real OpenVINO: a tree node's logits are those of its path alone; sequences that
share a call do not touch each other; row copies, rollback and reused blocks over hundreds of random rounds leave the
cache as a fresh prefill would.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_trees import path_to_root, trees

from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import ContextOverflowError
from dovetail.runtime.targets.openvino.engine import MAX_TREE_NODES, PREFILL_CHUNK, Numerics, TargetModel
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, root_only

TOLERANCE = 2e-5  # float32 sums in another order, logits of about 10


def load(path: Path, numerics: Numerics = "exact", cache_tokens: int = 512) -> TargetModel:
    artifact = open_artifact(path)
    return TargetModel(
        artifact.file(TARGET_MODEL), artifact.manifest.target, numerics=numerics, threads=2, cache_tokens=cache_tokens
    )


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Iterator[TargetModel]:
    loaded = load(tiny_artifact)
    yield loaded
    assert loaded.pool.num_free == loaded.pool.num_blocks, "a test leaked blocks"


def random_tokens(model: TargetModel, rng: np.random.Generator, count: int) -> Int64s:
    return rng.integers(0, model.info.vocab_size, count)


def next_logits(model: TargetModel, text: Int64s) -> Float32s:
    """[V] after `text`, from a fresh sequence."""
    sequence = model.sequence()
    sequence.prefill(text[:-1])
    logits = sequence.verify(root_only(int(text[-1]))).logits[0].copy()
    sequence.close()
    return logits


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees(max_nodes=16, vocab=500), st.integers(0, 90), st.integers(0, 2**32 - 1))
def test_a_node_is_its_path_alone(model: TargetModel, tree: Tree, past: int, seed: int) -> None:
    prompt = random_tokens(model, np.random.default_rng(seed), past)
    sequence = model.sequence()
    features = sequence.prefill(prompt).features
    assert features.shape == (past, model.info.hidden_size)
    out = sequence.verify(tree)
    logits, features = out.logits.copy(), out.features.copy()
    sequence.close()
    for node in range(len(tree)):
        path = tree.tokens[path_to_root(tree, node)[::-1]]
        alone = model.sequence()
        alone.prefill(np.concatenate([prompt, path[:-1]]))
        expected = alone.verify(root_only(int(path[-1])))
        np.testing.assert_allclose(logits[node], expected.logits[0], atol=TOLERANCE)
        np.testing.assert_allclose(features[node], expected.features[0], atol=TOLERANCE)
        alone.close()


def test_a_shared_call_equals_separate_calls(model: TargetModel) -> None:
    rng = np.random.default_rng(1)
    first, second, third = (model.sequence() for _ in range(3))
    first.prefill(random_tokens(model, rng, 37))
    second.prefill(random_tokens(model, rng, 21))
    tree_a = Tree(random_tokens(model, rng, 8), np.array([-1, 0, 0, 1, 1, 2, 5, 6]))
    tree_b = Tree(random_tokens(model, rng, 5), np.array([-1, 0, 1, 1, 0]))
    prompt = Tree(random_tokens(model, rng, 45), np.arange(-1, 44))
    separate = []
    for sequence, tree in ((first, tree_a), (second, tree_b), (third, prompt)):
        out = sequence.verify(tree)
        separate.append((out.logits.copy(), out.features.copy()))
    together = model.forward([first.step(tree_a), second.step(tree_b), third.step(prompt)])
    for (logits, features), out in zip(separate, together, strict=True):
        np.testing.assert_allclose(out.logits, logits, atol=TOLERANCE)
        np.testing.assert_allclose(out.features, features, atol=TOLERANCE)
    for sequence in (first, second, third):
        sequence.close()


def test_prefill_in_chunks_is_one_text(model: TargetModel) -> None:
    text = random_tokens(model, np.random.default_rng(2), PREFILL_CHUNK + 40)
    whole, parts = model.sequence(), model.sequence()
    features = whole.prefill(text).features
    pieces = [parts.prefill(part).features for part in np.split(text, [10, 11, 100])]
    np.testing.assert_allclose(np.concatenate(pieces), features, atol=TOLERANCE)
    whole.close()
    parts.close()


def test_hundreds_of_random_rounds_leave_the_cache_of_a_fresh_prefill(model: TargetModel) -> None:
    """Three texts take turns, accept random paths, roll back, end and begin anew in the blocks of others."""
    rng = np.random.default_rng(3)
    sequences = [model.sequence() for _ in range(3)]
    texts: list[Int64s] = [np.zeros(0, np.int64) for _ in sequences]
    checked = 0
    for turn in range(400):
        which = int(rng.integers(3))
        sequence = sequences[which]
        if len(texts[which]) > 120 or (len(texts[which]) and rng.random() < 0.03):
            sequence.close()
            texts[which] = np.zeros(0, np.int64)
        elif len(texts[which]) and rng.random() < 0.1:
            kept = int(rng.integers(0, len(texts[which])))
            sequence.truncate(kept)
            texts[which] = texts[which][:kept]
        size = int(rng.integers(1, 14))
        parents = np.array([-1, *(int(rng.integers(0, i)) for i in range(1, size))])
        tree = Tree(random_tokens(model, rng, size), parents)
        sequence.verify(tree)
        path = path_to_root(tree, int(rng.integers(0, size)))[::-1]
        sequence.commit(path)
        texts[which] = np.concatenate([texts[which], tree.tokens[path]])
        assert sequence.length == len(texts[which])
        if turn % 5 == 0:
            probe = int(rng.integers(0, model.info.vocab_size))
            got = sequence.verify(root_only(probe)).logits[0].copy()
            expected = next_logits(model, np.append(texts[which], probe))
            np.testing.assert_allclose(got, expected, atol=TOLERANCE)
            checked += 1
    assert checked == 80
    for sequence in sequences:
        sequence.close()


def test_fast_numerics_stay_near_exact(model: TargetModel, tiny_artifact: Path) -> None:
    text = random_tokens(model, np.random.default_rng(4), 60)
    exact = next_logits(model, text)
    fast = next_logits(load(tiny_artifact, "fast"), text)
    assert 0 < np.abs(fast - exact).max() < 0.1 * np.abs(exact).max()


def test_a_full_cache_is_an_error_and_costs_no_blocks(tiny_artifact: Path) -> None:
    small = load(tiny_artifact, cache_tokens=64)
    sequence = small.sequence()
    with pytest.raises(ContextOverflowError):
        sequence.prefill(np.zeros(64 + MAX_TREE_NODES + 40, np.int64))
    sequence.close()
    assert small.pool.num_free == small.pool.num_blocks
