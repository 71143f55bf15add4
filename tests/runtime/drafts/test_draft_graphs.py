"""Proves that a draft proposes the same trees whichever engine runs its graph, that its caches are written in place,
and what crosses to its device and back.

Tests marked `gpu` do the same with CUDA; they skip themselves where there is no usable NVIDIA GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dovetail.runtime import load
from dovetail.runtime.artifact.manifest import DRAFT_MODEL, loads
from dovetail.runtime.drafts.graph_contract import DraftGraph
from dovetail.runtime.drafts.loading import load_draft
from dovetail.runtime.drafts.model_draft import READ_AT_ONCE, ModelDraft
from dovetail.runtime.drafts.onnxruntime_graph import OnnxDraft, OnnxMemory
from dovetail.runtime.errors import DraftError
from dovetail.runtime.hardware.devices import why_no_cuda
from dovetail.runtime.policies.base import NO_GROWTH, FixedGrowth
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Tree

DEVICES = [
    "cpu",
    "openvino:CPU",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(why_no_cuda(0)), reason=f"no CUDA: {why_no_cuda(0)}")]
    ),
]
SHAPE = TreeShape(nodes=16, depth=5, width=4)
Open = Callable[[str], DraftGraph]


@pytest.fixture(scope="module")
def open_draft(tiny_artifact: Path) -> Open:
    info = loads((tiny_artifact / "dovetail.json").read_bytes()).draft
    assert info is not None
    path = tiny_artifact / DRAFT_MODEL
    return lambda device: load_draft(path, info, device=device, threads=2, context_length=600)


def read(sequence: ModelDraft, count: int, *, seed: int = 0) -> Tree:
    """Feed a text of `count` tokens in uneven parts; the last tree."""
    rng = np.random.default_rng(seed)
    tokens, features = rng.integers(0, 512, count), rng.standard_normal((count, 64)).astype(np.float32)
    tree, begin, size = None, 0, 5
    while begin < count:
        new = tokens[begin : begin + size]
        before = features[max(begin - 1, 0) : begin + len(new) - 1]
        tree = sequence.propose(new, before, FixedGrowth(SHAPE))
        begin, size = begin + size, size % 7 + 1
    assert tree is not None
    return tree


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [6, 90])
def test_every_engine_proposes_the_same_trees(open_draft: Open, device: str, count: int) -> None:
    """Random weights make near ties, which 8-bit arithmetic may order another way: nearly all nodes are the same."""
    expected, got = (read(open_draft(name).sequence(), count) for name in ("cpu", device))
    common = set(paths(expected)) & set(paths(got))
    assert len(common) >= 13


def paths(tree: Tree) -> list[tuple[int, ...]]:
    """Each node as the tokens from the root to it."""
    found: list[tuple[int, ...]] = []
    for node, token in enumerate(tree.tokens.tolist()):
        found.append((*(found[tree.parents[node]] if node else ()), token))
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_rolled_back_and_read_again_is_the_same(open_draft: Open, device: str) -> None:
    sequence = open_draft(device).sequence()
    first = read(sequence, 40)
    read(sequence, 30, seed=1)
    sequence.truncate(0)
    again = read(sequence, 40)
    assert again.tokens.tolist() == first.tokens.tolist()
    assert again.parents.tolist() == first.parents.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_trees_leave_no_trace_in_the_cache(open_draft: Open, device: str) -> None:
    """A text read with a tree after every few tokens ends in the tree of one that was read in one go."""
    model, rng = open_draft(device), np.random.default_rng(3)
    tokens, features = rng.integers(0, 512, 50), rng.standard_normal((50, 64)).astype(np.float32)
    at_once = model.sequence().propose(tokens, features[:-1], FixedGrowth(SHAPE))
    parts = model.sequence()
    for begin in range(0, 50, 5):
        growth = NO_GROWTH if begin == 20 else FixedGrowth(SHAPE)
        tree = parts.propose(tokens[begin : begin + 5], features[max(begin - 1, 0) : begin + 4], growth)
    assert len(set(paths(tree)) & set(paths(at_once))) >= 13


def test_of_a_long_prompt_the_end_is_read(open_draft: Open) -> None:
    """As if the text had begun there; going back behind what is kept leaves nothing, and reading begins anew."""
    model, rng = open_draft("cpu"), np.random.default_rng(4)
    size = READ_AT_ONCE + 300
    tokens, features = rng.integers(0, 512, size), rng.standard_normal((size, 64)).astype(np.float32)
    grow = FixedGrowth(SHAPE)
    whole, end = model.sequence(), model.sequence()
    tree = whole.propose(tokens, features[:-1], grow)
    expected = end.propose(tokens[-READ_AT_ONCE - 1 :], features[-READ_AT_ONCE - 1 : -1], grow)
    assert paths(tree) == paths(expected)
    assert (whole.known, whole.length) == (size - 1, READ_AT_ONCE)
    whole.truncate(size - 11)
    assert (whole.known, whole.length) == (size - 11, READ_AT_ONCE - 10)
    whole.truncate(100)
    assert (whole.known, whole.length) == (100, 0)
    expected = model.sequence().propose(tokens[100:120], features[101:120], grow)
    assert paths(whole.propose(tokens[101:120], features[101:120], grow)) == paths(expected)


def test_caches_are_written_in_place(open_draft: Open) -> None:
    """ONNX Runtime is given one memory for a cache's input and output: rows of this call appear in it, others stay."""
    sequence = open_draft("cpu").sequence()
    read(sequence, 20)
    memory = sequence._memory
    assert isinstance(memory, OnnxMemory)
    addresses = [cache.data_ptr() for cache in memory._caches]
    before = [cache.numpy()[: sequence.length].copy() for cache in memory._caches]
    length = sequence.length
    sequence.propose(np.array([3, 4]), np.ones((2, 64), np.float32), FixedGrowth(SHAPE))
    assert [cache.data_ptr() for cache in memory._caches] == addresses
    for old, cache in zip(before, memory._caches, strict=True):
        rows = cache.numpy()
        np.testing.assert_array_equal(rows[:length], old)
        assert np.abs(rows[length : length + 2]).sum(axis=1).all()


def test_caches_grow_with_the_text(open_draft: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read(open_draft("cpu").sequence(), 120)
    monkeypatch.setattr("dovetail.runtime.drafts.onnxruntime_graph.FIRST_ROWS", 16)
    sequence = open_draft("cpu").sequence()
    assert read(sequence, 120).tokens.tolist() == expected.tokens.tolist()
    assert isinstance(sequence._memory, OnnxMemory)
    assert sequence._memory._rows >= 120


def test_a_tree_that_outgrows_the_cache_is_the_drafts_failure(open_draft: Open) -> None:
    model = open_draft("cpu")
    assert isinstance(model, OnnxDraft)
    model.context_length = -990  # room for 34 rows
    with pytest.raises(DraftError, match="expected at most 34 cache rows"):
        read(model.sequence(), 90)


@pytest.mark.parametrize("device", DEVICES)
def test_what_crosses_in_a_round_is_counted_and_small(open_draft: Open, device: str) -> None:
    """Up: ids, rows and masks of the levels, and the new tokens' features. Down: children. Never the caches: a round at
    500 tokens moves what a round at 50 does.
    """
    model, moved = open_draft(device), []
    for count in (50, 500):
        sequence = model.sequence()
        read(sequence, count)
        before = sequence.bytes_in, sequence.bytes_out
        sequence.propose(np.arange(3), np.ones((3, 64), np.float32), FixedGrowth(SHAPE))
        moved.append((sequence.bytes_in - before[0], sequence.bytes_out - before[1]))
    assert moved[0] == moved[1]
    if device != "openvino:CPU":  # which keeps its predicted features on the host
        assert moved[0] == bytes_of_a_round(new=3, hidden_size=64, depth=5, width=4, children=4)
        # What follows for a 7 B target, the paper's depth and width, and 5 new tokens a round. Sampled texts make use
        # of more children.
        assert sum(bytes_of_a_round(new=5, hidden_size=4096, depth=7, width=10, children=10)) <= 64 * 1024
        sampled = bytes_of_a_round(new=5, hidden_size=4096, depth=7, width=10, children=model.info.top_k)
        assert sum(sampled) <= 96 * 1024


def bytes_of_a_round(*, new: int, hidden_size: int, depth: int, width: int, children: int) -> tuple[int, int]:
    """(up, down): per pair four or five 8-byte numbers, its mask with up to 127 columns more than the rows it is about,
    and the float16 features of new ones; per child a 4-byte id and a 4-byte log-probability.
    """
    first = new * (4 * 8 + 2 * hidden_size) + new * columns(new) + 2 * 8
    levels = sum(width * 5 * 8 + width * columns(width * level) + 8 for level in range(1, depth))
    return first + levels, (1 + (depth - 1) * width) * children * (4 + 4)


def columns(rows: int) -> int:
    """Of a mask about so many cache rows."""
    return (rows + 63) // 64 * 64 + 64


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_of_an_earlier_export_proposes_the_same_trees(
    open_draft: Open, tiny_artifact: Path, tmp_path: Path, device: str
) -> None:
    """It can't be told how many children are wanted, and always gives all."""
    model = onnx.load(tiny_artifact / DRAFT_MODEL)
    (num_children,) = (port for port in model.graph.input if port.name == "num_children")
    model.graph.input.remove(num_children)
    current = open_draft(device)
    model.graph.initializer.append(numpy_helper.from_array(np.array([current.info.top_k]), "num_children"))
    onnx.save(model, tmp_path / "model.onnx")
    earlier = load_draft(tmp_path / "model.onnx", current.info, device=device, threads=2, context_length=600)
    assert paths(read(earlier.sequence(), 40)) == paths(read(current.sequence(), 40))


@pytest.mark.parametrize("device", DEVICES)
def test_first_law_on_every_device(tiny_artifact: Path, device: str) -> None:
    settings = {"temperature": 1.0, "seed": 3, "max_new_tokens": 40, "ignore_eos": True}
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="none") as pipe:
        expected = pipe.generate("def main(argv):", **settings).token_ids
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft_device=device) as pipe:
        done = pipe.generate("def main(argv):", **settings)
    assert done.token_ids == expected
    assert done.draft_device == device
    assert done.drafted_tokens > 0


@pytest.mark.gpu
@pytest.mark.skipif(bool(why_no_cuda(0)), reason=f"no CUDA: {why_no_cuda(0)}")
def test_cuda_out_of_memory_ends_the_draft_and_not_the_text(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.runtime.drafts.onnxruntime_graph.FIRST_ROWS", 1 << 40)
    monkeypatch.setattr("dovetail.runtime.drafts.onnxruntime_graph.TREE_ROWS", 1 << 40)
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft="none") as pipe:
        expected = pipe.generate("def main(argv):", max_new_tokens=40, ignore_eos=True).token_ids
    with load(tiny_artifact, numerics="exact", ctx_size=256, draft_device="cuda") as pipe:
        done = pipe.generate("def main(argv):", max_new_tokens=40, ignore_eos=True)
    assert done.token_ids == expected
    assert done.draft_failure is not None
