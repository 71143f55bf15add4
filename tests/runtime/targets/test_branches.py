"""Proves what a tree's paths cost and give in the OpenVINO engine: every row is bit for bit that of plain decoding, of
whatever path, in any company and at any page's border; the pages of branches come back whatever happens behind them;
and where there is no room for them, nothing has changed. And what is given may be read in any chunks, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces.random_trees import path_to_root, trees

from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import CacheFullError
from dovetail.runtime.targets.base import Acceptance, Numerics, Step, StepOutput, read
from dovetail.runtime.targets.openvino import engine
from dovetail.runtime.targets.openvino.engine import OpenVinoSequence, OpenVinoTarget
from dovetail.runtime.targets.openvino.layout import Rows
from dovetail.runtime.trees.shape import MAX_TREE_NODES
from dovetail.runtime.trees.tree import Int64s, Tree, chain, root_only

VOCAB = 512
PAGE = 32


def load(
    path: Path,
    numerics: Numerics = "exact",
    *,
    threads: int = 2,
    capacity: int = 4096,
    acceptance: Acceptance = "confirmed",
) -> OpenVinoTarget:
    artifact = open_artifact(path)
    return OpenVinoTarget(
        artifact.file(TARGET_MODEL),
        artifact.manifest.target,
        numerics=numerics,
        threads=threads,
        capacity=capacity,
        acceptance=acceptance,
    )


@pytest.fixture(scope="module", params=[("fast", 2), ("fast", 5), ("exact", 2)])
def target(tiny_artifact: Path, request: pytest.FixtureRequest) -> Iterator[OpenVinoTarget]:
    numerics, threads = request.param
    loaded = load(tiny_artifact, numerics, threads=threads)
    assert loaded.pool.page_size == PAGE
    yield loaded
    assert loaded.free == loaded.capacity, "a test leaked pages"


@pytest.fixture
def small(tiny_artifact: Path) -> Iterator[OpenVinoTarget]:
    loaded = load(tiny_artifact, capacity=4 * PAGE)
    yield loaded
    assert loaded.free == loaded.capacity, "the test leaked pages"


def random_tokens(seed: int, count: int) -> Int64s:
    return np.random.default_rng(seed).integers(0, VOCAB, count)


def tree_of(*parents: int) -> Tree:
    """Of a root and nodes with these parents, each with another token."""
    return Tree(np.arange(5, len(parents) + 6), np.array([-1, *parents]))


WIDE = tree_of(0, 0, 1, 2, 2, 4)
"""Paths [0, 1, 3], [0, 2, 4, 6] and [0, 2, 5]."""


@contextlib.contextmanager
def text(target: OpenVinoTarget, tokens: Int64s) -> Iterator[OpenVinoSequence]:
    with contextlib.closing(target.sequence()) as sequence:
        if len(tokens):
            read(target, sequence, tokens)
        yield sequence


def forward(target: OpenVinoTarget, *steps: Step, rows: int = 0) -> list[StepOutput]:
    """A pass, whose results outlive the next one."""
    return [StepOutput(out.logits.copy(), out.features.copy()) for out in target.forward(steps, rows)]


def plainly(target: OpenVinoTarget, past: Int64s, drawn: Sequence[int]) -> StepOutput:
    """What the last of the `drawn` tokens gets, one token a pass."""
    with text(target, past) as sequence:
        for token in drawn:
            (out,) = forward(target, Step(sequence, root_only(int(token))))
            sequence.commit([0])
    return out


def assert_same(got: StepOutput, expected: StepOutput) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(got.logits, expected.logits)
    np.testing.assert_array_equal(got.features, expected.features)


def node_of(out: StepOutput, node: int) -> StepOutput:
    return StepOutput(out.logits[node : node + 1], out.features[node : node + 1])


def path_of(tree: Tree, node: int) -> list[int]:
    return path_to_root(tree, node)[::-1]


@settings(max_examples=15)
@given(trees(max_nodes=12, vocab=VOCAB), st.integers(0, 2**32 - 1), st.integers(0, 70), st.integers(0, 60))
def test_every_node_gets_what_plain_decoding_gives(
    target: OpenVinoTarget, tree: Tree, seed: int, length: int, rows: int
) -> None:
    past = random_tokens(seed, length)
    with text(target, past) as sequence:
        (out,) = forward(target, Step(sequence, tree), rows=rows)
    assert out.logits.shape == (len(tree), VOCAB)
    for node in range(len(tree)):
        assert_same(node_of(out, node), plainly(target, past, tree.tokens[path_of(tree, node)].tolist()))


@settings(max_examples=15)
@given(
    st.lists(st.tuples(trees(max_nodes=8, vocab=VOCAB), st.integers(0, 70), st.booleans()), min_size=2, max_size=4),
    st.integers(0, 60),
)
def test_company_changes_no_bit(target: OpenVinoTarget, drawn: list[tuple[Tree, int, bool]], rows: int) -> None:
    """Trees beside chunks of prompts, one token of them included."""
    with contextlib.ExitStack() as stack:
        steps = []
        for i, (tree, length, is_prompt) in enumerate(drawn):
            sequence = stack.enter_context(text(target, random_tokens(i, length)))
            steps.append(Step(sequence, chain(tree.tokens) if is_prompt else tree, is_prompt=is_prompt))
        separate = [forward(target, step)[0] for step in steps]
        for got, expected in zip(forward(target, *steps, rows=rows), separate, strict=True):
            assert_same(got, expected)


@settings(max_examples=15)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 300),
    st.lists(st.one_of(st.integers(0, 300), st.integers(1, 1).map(lambda one: -one)), max_size=4),
)
def test_a_prompt_may_be_read_in_any_chunks(target: OpenVinoTarget, seed: int, length: int, cuts: list[int]) -> None:
    """Those of one token, which -1 stands for at the end, get the bits that they have in a longer one."""
    tokens = random_tokens(seed, length)
    places = sorted({(length - 1 if cut < 0 else min(cut, length - 1)) for cut in cuts} - {0})
    with text(target, tokens[:0]) as whole, text(target, tokens[:0]) as parts:
        (expected,) = forward(target, Step(whole, chain(tokens), [length - 1], is_prompt=True))
        outs = []
        for chunk in np.split(tokens, places):
            outs += forward(target, Step(parts, chain(chunk), [len(chunk) - 1], is_prompt=True))
            parts.commit(range(len(chunk)))
        whole.commit(range(length))
        assert_same(StepOutput(outs[-1].logits, np.concatenate([out.features for out in outs])), expected)
        next_ones = forward(target, Step(whole, root_only(3)), Step(parts, root_only(3)))
    assert_same(*next_ones)


def test_a_chunk_of_one_token_is_one_token(target: OpenVinoTarget) -> None:
    """Its block's second row goes nowhere: neither into what comes back, nor into the text."""
    past = random_tokens(1, 40)
    with text(target, past) as sequence, text(target, past) as other:
        out, beside = forward(
            target, Step(sequence, root_only(9), is_prompt=True), Step(other, root_only(9), [], is_prompt=True)
        )
        assert (out.logits.shape, out.features.shape) == ((1, VOCAB), (1, target.info.hidden_size))
        assert beside.logits.shape == (0, VOCAB)
        sequence.commit([0])
        assert sequence.length == 41
        (got,) = forward(target, Step(sequence, root_only(4)))
    with text(target, np.append(past, 9)) as sequence:
        (expected,) = forward(target, Step(sequence, root_only(4)))
    assert_same(got, expected)


@pytest.mark.parametrize("length", [0, 1, PAGE - 3, PAGE - 2, PAGE - 1, PAGE, 2 * PAGE - 2])
@pytest.mark.parametrize("node", range(len(WIDE)))
def test_any_path_may_be_kept_at_any_border_of_a_page(target: OpenVinoTarget, length: int, node: int) -> None:
    past, path = random_tokens(2, length), path_of(WIDE, node)
    with text(target, past) as sequence:
        target.forward([Step(sequence, WIDE)])
        sequence.commit(path)
        assert sequence.length == length + len(path)
        assert target.capacity - target.free <= -(-(length + 4) // PAGE) * PAGE, "the branches' pages are back"
        (got,) = forward(target, Step(sequence, root_only(7)))
    assert_same(got, plainly(target, past, [*WIDE.tokens[path].tolist(), 7]))


@settings(max_examples=15)
@given(st.lists(st.tuples(trees(max_nodes=10, vocab=VOCAB), st.integers(0, 9)), min_size=1, max_size=8))
def test_paths_behind_paths(target: OpenVinoTarget, rounds: list[tuple[Tree, int]]) -> None:
    past, drawn = random_tokens(3, 25), list[int]()
    with text(target, past) as sequence:
        for tree, node in rounds:
            path = path_of(tree, min(node, len(tree) - 1))
            target.forward([Step(sequence, tree)])
            sequence.commit(path)
            drawn += tree.tokens[path].tolist()
        (got,) = forward(target, Step(sequence, root_only(7)))
    assert_same(got, plainly(target, past, [*drawn, 7]))


def pages_of(past: int, tree: Tree) -> int:
    """A page for each path behind the first, and those of the text."""
    begin, paths = past // PAGE, tree.paths()
    own = -(-(past + max(map(len, paths))) // PAGE)
    return own + sum(-(-(past + len(path)) // PAGE) - begin for path in paths[1:])


@pytest.mark.parametrize("length", [5, PAGE - 2, PAGE])
@pytest.mark.parametrize("ending", ["commit", "truncate", "close", "another tree", "a chain", "a prompt"])
def test_the_pages_of_branches_come_back(target: OpenVinoTarget, length: int, ending: str) -> None:
    with text(target, random_tokens(4, length)) as sequence:
        for is_fed in (False, True):
            sequence.truncate(length)
            sequence.reserve_tree(WIDE)
            used = target.capacity - target.free
            assert used == pages_of(length, WIDE) * PAGE
            sequence.reserve_tree(WIDE)
            assert target.capacity - target.free == used, "there was room already"
            if is_fed:
                target.forward([Step(sequence, WIDE)])
                assert target.capacity - target.free == used, "the pass takes what was reserved"
            elif ending == "commit":
                continue
            if ending == "commit":
                sequence.commit([0, 2, 5])
                sequence.truncate(length)
            elif ending == "truncate":
                sequence.truncate(length)
            elif ending == "close":
                sequence.close()
                assert target.free == target.capacity
                read(target, sequence, random_tokens(4, length))
            elif ending == "another tree":
                other = tree_of(0, 0)
                sequence.reserve_tree(other)
                sequence.truncate(length)
            elif ending == "a chain":
                sequence.reserve_tree(chain(np.arange(2)))
                sequence.truncate(length)
            else:
                target.forward([Step(sequence, chain(np.arange(2)), is_prompt=True)])
                sequence.truncate(length)
            assert target.capacity - target.free == -(-length // PAGE) * PAGE


@pytest.mark.parametrize(("length", "reserved"), [(30, 0), (31, 0), (31, 20), (64, 0)])
def test_where_branches_find_no_room_nothing_has_changed(small: OpenVinoTarget, length: int, reserved: int) -> None:
    """There are four pages, and a tree that wants one for each of five paths."""
    past, bush = random_tokens(5, length), tree_of(0, 0, 0, 0, 0)
    with text(small, past) as sequence:
        sequence.reserve(reserved)
        before = (small.free, sequence.table.pages.copy(), sequence.length)
        for attempt in (lambda: sequence.reserve_tree(bush), lambda: small.forward([Step(sequence, bush)])):
            with pytest.raises(CacheFullError):
                attempt()
            assert (small.free, sequence.table.pages, sequence.length) == before
        (got,) = forward(small, Step(sequence, bush.first_chain()))
    assert_same(node_of(got, 1), plainly(small, past, bush.first_chain().tokens.tolist()))


def test_a_fork_shares_the_past_with_the_branches_of_the_other(target: OpenVinoTarget) -> None:
    """Each writes behind it into pages of its own."""
    past = random_tokens(6, PAGE + 9)
    with text(target, past) as first, contextlib.closing(first.fork()) as second:
        outs = forward(target, Step(first, WIDE), Step(second, WIDE), rows=30)
        assert_same(*outs)
        first.commit([0, 2, 4, 6])
        second.commit([0, 2, 5])
        got = forward(target, Step(first, root_only(7)), Step(second, root_only(7)))
    for out, path in zip(got, ([0, 2, 4, 6], [0, 2, 5]), strict=True):
        assert_same(out, plainly(target, past, [*WIDE.tokens[path].tolist(), 7]))


def fed(target: OpenVinoTarget) -> tuple[int, int]:
    """Rows and subsequences of the last pass."""
    sizes = [target._request.get_tensor(name).size for name in ("input_ids", "past_lens")]
    return sizes[0], sizes[1]


def test_a_tree_costs_a_row_for_each_node_of_each_path(target: OpenVinoTarget) -> None:
    with text(target, random_tokens(8, 20)) as sequence, text(target, random_tokens(8, 20)) as other:
        target.forward([Step(sequence, WIDE)])
        assert fed(target) == (3 + 4 + 3, 10), "each a subsequence"
        target.forward([Step(sequence, WIDE), Step(other, chain(np.arange(6)), is_prompt=True)], 20)
        assert fed(target) == (20, 10 + 1 + 1), "the chunk is one, and so are four rows that nobody reads"
        target.forward([Step(sequence, root_only(1))])
        assert fed(target) == ((2, 2) if target.threads == 2 else (3, 2)), "another row alone, or a block"
        target.forward([Step(sequence, root_only(1), is_prompt=True)])
        assert fed(target) == (2, 1)


def test_relaxed_a_tree_is_one_block(tiny_artifact: Path, target: OpenVinoTarget) -> None:
    """A row a node, alone where no more are asked for; near what rows alone give."""
    relaxed = load(tiny_artifact, target.numerics, acceptance="relaxed")
    past = random_tokens(8, 20)
    with text(relaxed, past) as sequence, text(target, past) as other:
        for tree in (WIDE, root_only(1), chain(np.arange(4))):
            forward(relaxed, Step(sequence, tree), rows=40)
            assert fed(relaxed) == (40, 2), "filled up, with a block of its own"
            (got,) = forward(relaxed, Step(sequence, tree))
            assert fed(relaxed) == (len(tree), 1)
            (expected,) = forward(target, Step(other, tree))
            np.testing.assert_allclose(got.logits, expected.logits, atol=0.3 if target.numerics == "fast" else 2e-5)
            assert relaxed.free == relaxed.capacity - PAGE, "no page for a sibling"
    assert relaxed.free == relaxed.capacity


@pytest.mark.parametrize("threads", [1, 2, 300])
def test_rows_that_nobody_reads_stay_in_their_own_pages(
    tiny_artifact: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are wanted, and with more threads than rows."""
    target, filled = load(tiny_artifact, capacity=64), list[Rows]()
    filling = engine.filling

    def watched(*arguments: object) -> Rows | None:
        fill = filling(*arguments)  # type: ignore[arg-type]  # whatever it is called with
        if fill is not None:
            filled.append(fill)
            assert len(fill) <= len(fill.pages) * PAGE
        return fill

    monkeypatch.setattr(engine, "filling", watched)
    target.threads = threads
    with text(target, random_tokens(7, 3)) as sequence:
        for rows in (0, 5, MAX_TREE_NODES, MAX_TREE_NODES + 1, 10_000):
            target.forward([Step(sequence, root_only(1))], rows)
        assert len(filled[-1]) >= MAX_TREE_NODES
        assert all(not set(fill.pages) & set(sequence.table.pages) for fill in filled)
        assert target.capacity - target.free == PAGE, "they are none of the cache's tokens"
