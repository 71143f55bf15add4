"""Proves the laws of a target, of the engine that runs in OpenVINO and of the slow obvious one in numpy alike: what a
node gets is what its path alone gets, however the text before it came into the cache, whoever shares the pass, and
whatever was drafted, rolled back, forked and closed before; every page comes back; a full cache changes nothing. And
the two engines agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from oracles.numpy_target import NumpyTarget
from traces.random_trees import path_to_root, trees

from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import CacheFullError
from dovetail.runtime.targets.base import PREFILL_CHUNK, Step, StepOutput, TargetEngine, TargetSequence, read
from dovetail.runtime.targets.openvino.engine import OpenVinoTarget
from dovetail.runtime.trees.tree import Int64s, Tree, chain, root_only

VOCAB = 512  # of the tiny checkpoint
CAPACITY = 2048
SMALL = 128  # whole pages of every engine here
TOLERANCE = 2e-5  # float32 sums in another order, logits of about 10
AGREEMENT = 1e-4  # two programs

Open = Callable[[int], TargetEngine]  # with a cache of so many tokens


def openvino_target(artifact_path: Path, capacity: int) -> TargetEngine:
    artifact = open_artifact(artifact_path)
    path, info = artifact.file(TARGET_MODEL), artifact.manifest.target
    return OpenVinoTarget(path, info, numerics="exact", threads=2, capacity=capacity)


@pytest.fixture(scope="module", params=["openvino", "numpy"])
def open_engine(request: pytest.FixtureRequest) -> Open:
    if request.param == "numpy":
        checkpoint = request.getfixturevalue("tiny_checkpoint")
        return lambda capacity: NumpyTarget.from_checkpoint(checkpoint, capacity=capacity)
    artifact = request.getfixturevalue("tiny_artifact_fp32")
    return lambda capacity: openvino_target(artifact, capacity)


@pytest.fixture(scope="module")
def engine(open_engine: Open) -> Iterator[TargetEngine]:
    engine = open_engine(CAPACITY)
    assert engine.capacity == engine.free == CAPACITY
    yield engine
    assert engine.free == engine.capacity, "a test leaked pages"
    engine.close()


@pytest.fixture
def small(open_engine: Open) -> Iterator[TargetEngine]:
    engine = open_engine(SMALL)
    assert engine.capacity == engine.free == SMALL
    yield engine
    assert engine.free == engine.capacity, "the test leaked pages"
    engine.close()


def random_tokens(rng: np.random.Generator, count: int) -> Int64s:
    return rng.integers(0, VOCAB, count)


def texts(min_size: int, max_size: int) -> st.SearchStrategy[Int64s]:
    """Random tokens, drawn as a seed: hypothesis need not think about each of them."""
    seeds = st.integers(0, 2**32 - 1)
    return st.builds(
        lambda seed, size: random_tokens(np.random.default_rng(seed), size), seeds, st.integers(min_size, max_size)
    )


def feeds(max_prompt: int = 70) -> st.SearchStrategy[Tree]:
    """What a text may feed into a pass: a draft's tree, or a piece of a prompt."""
    return st.one_of(trees(max_nodes=12, vocab=VOCAB), texts(1, max_prompt).map(chain))


def forward(engine: TargetEngine, *steps: Step) -> list[StepOutput]:
    """A pass, whose results outlive the next one."""
    return [StepOutput(out.logits.copy(), out.features.copy()) for out in engine.forward(steps)]


@contextlib.contextmanager
def sequences(engine: TargetEngine, *pasts: Int64s) -> Iterator[list[TargetSequence]]:
    """A sequence for each of these texts."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(contextlib.closing(engine.sequence())) for _ in pasts]
        for sequence, past in zip(opened, pasts, strict=True):
            read(engine, sequence, past)
        yield opened


def alone(engine: TargetEngine, text: Int64s) -> StepOutput:
    """What the last token of `text` gets from a new sequence."""
    with sequences(engine, text[:-1]) as (sequence,):
        return forward(engine, Step(sequence, root_only(int(text[-1]))))[0]


def assert_close(got: StepOutput, expected: StepOutput, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=tolerance)
    np.testing.assert_allclose(got.features, expected.features, rtol=0, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(trees(max_nodes=16, vocab=VOCAB), texts(0, 90))
def test_a_node_is_its_path_alone(engine: TargetEngine, tree: Tree, past: Int64s) -> None:
    with sequences(engine, past) as (sequence,):
        out = forward(engine, Step(sequence, tree))[0]
    assert out.logits.shape == (len(tree), VOCAB)
    assert out.features.shape == (len(tree), engine.info.hidden_size)
    for node in range(len(tree)):
        path = tree.tokens[path_to_root(tree, node)[::-1]]
        got = StepOutput(out.logits[node : node + 1], out.features[node : node + 1])
        assert_close(got, alone(engine, np.concatenate([past, path])))


@settings(max_examples=10, deadline=None)
@given(texts(1, PREFILL_CHUNK + 60), st.lists(st.integers(0, PREFILL_CHUNK + 60), max_size=5))
def test_a_prompt_in_chunks_is_the_prompt_in_one(engine: TargetEngine, text: Int64s, cuts: list[int]) -> None:
    last = len(text) - 1
    with sequences(engine, text[:0], text[:0]) as (whole, parts):
        expected = forward(engine, Step(whole, chain(text), [last]))[0]
        chunks = [chunk for chunk in np.split(text, sorted(min(cut, last) for cut in cuts)) if len(chunk)]
        outs = [read(engine, parts, chunk) for chunk in chunks]
        logits = outs[-1].logits.copy()
        assert parts.length == len(text)
        assert whole.length == 0, "a pass alone commits nothing"
    assert_close(StepOutput(logits, np.concatenate([out.features for out in outs])), expected)


def test_no_tokens_are_read_at_once(engine: TargetEngine) -> None:
    with sequences(engine, np.zeros(0, np.int64)) as (sequence,):
        out = read(engine, sequence, np.zeros(0, np.int64))
        assert (out.logits.shape, out.features.shape) == ((0, VOCAB), (0, engine.info.hidden_size))
        assert sequence.length == 0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(texts(0, 70), feeds()), min_size=2, max_size=5))
def test_a_shared_pass_equals_separate_ones(engine: TargetEngine, drawn: list[tuple[Int64s, Tree]]) -> None:
    with sequences(engine, *(past for past, _ in drawn)) as opened:
        steps = [Step(sequence, tree) for sequence, (_, tree) in zip(opened, drawn, strict=True)]
        separate = [forward(engine, step)[0] for step in steps]
        for got, expected in zip(forward(engine, *steps), separate, strict=True):
            assert_close(got, expected)


@settings(max_examples=15, deadline=None)
@given(st.lists(feeds(), min_size=1, max_size=3), st.data())
def test_wanted_rows_are_those_of_all(engine: TargetEngine, drawn: list[Tree], data: st.DataObject) -> None:
    wanted = [sorted(data.draw(st.sets(st.integers(0, len(tree) - 1)))) for tree in drawn]
    pasts = [np.arange(5 * i) for i in range(len(drawn))]
    with sequences(engine, *pasts) as opened:
        every = forward(engine, *(Step(sequence, tree) for sequence, tree in zip(opened, drawn, strict=True)))
        some = forward(engine, *map(Step, opened, drawn, wanted))
    for got, whole, rows in zip(some, every, wanted, strict=True):
        assert got.logits.shape == (len(rows), VOCAB)
        assert_close(got, StepOutput(whole.logits[rows], whole.features))


@dataclasses.dataclass
class Text:
    """A sequence, and what it must hold."""

    sequence: TargetSequence
    tokens: list[int]

    def take(self, tree: Tree, path: Sequence[int]) -> None:
        self.sequence.commit(path)
        self.tokens += tree.tokens[path].tolist()


class Trace(RuleBasedStateMachine):
    """Up to four texts do whatever texts do. `check` looks at one of them, and at the end at all: looking takes a
    shared page away, so it must not happen after every rule.
    """

    which = st.integers(0, 3)
    tree = feeds(max_prompt=40)
    node = st.integers(-1, 39)  # whose path is kept; -1: of none

    def __init__(self, engine: TargetEngine) -> None:
        super().__init__()
        self.engine = engine
        self.texts = [Text(engine.sequence(), [])]

    def text(self, which: int) -> Text:
        return self.texts[which % len(self.texts)]

    def with_room(self, which: int) -> Text:
        """One that is short: it ends where it had become long."""
        text = self.text(which)
        if len(text.tokens) > 80:
            self.end(which)
        return text

    def add(self, text: Text) -> None:
        if len(self.texts) < 4:
            self.texts.append(text)
        else:
            text.sequence.close()

    @staticmethod
    def path(tree: Tree, node: int) -> list[int]:
        return path_to_root(tree, min(node, len(tree) - 1))[::-1]

    @rule(which=which, tree=tree, node=node)
    def feed(self, which: int, tree: Tree, node: int) -> None:
        text = self.with_room(which)
        self.engine.forward([Step(text.sequence, tree)])
        text.take(tree, self.path(tree, node))

    @rule(drawn=st.lists(st.tuples(tree, node), min_size=4, max_size=4))
    def feed_all(self, drawn: list[tuple[Tree, int]]) -> None:
        pairs = [(self.with_room(i), *drawn[i]) for i in range(len(self.texts))]
        self.engine.forward([Step(text.sequence, tree) for text, tree, _ in pairs])
        for text, tree, node in pairs:
            text.take(tree, self.path(tree, node))

    @rule(which=which, prompt=texts(1, 70))
    def read_a_prompt(self, which: int, prompt: Int64s) -> None:
        text = self.with_room(which)
        read(self.engine, text.sequence, prompt)
        text.tokens += prompt.tolist()

    @rule(which=which, tree=tree, node=node, feeds_it=st.booleans())
    def reserve_a_tree(self, which: int, tree: Tree, node: int, feeds_it: bool) -> None:
        text = self.with_room(which)
        text.sequence.reserve_tree(tree)
        free = self.engine.free
        text.sequence.reserve_tree(tree)
        assert self.engine.free == free, "there is room already"
        if feeds_it:
            self.engine.forward([Step(text.sequence, tree)])
            assert self.engine.free == free, "the pass takes what was reserved"
            text.take(tree, self.path(tree, node))
            assert self.engine.free >= free, "what only the siblings needed is back"

    @rule(which=which)
    def fork(self, which: int) -> None:
        text = self.text(which)
        self.add(Text(text.sequence.fork(), text.tokens.copy()))

    @rule(which=which, tree=tree, node=node)
    def fork_between_pass_and_commit(self, which: int, tree: Tree, node: int) -> None:
        text = self.with_room(which)
        self.engine.forward([Step(text.sequence, tree)])
        self.fork(which)
        text.take(tree, self.path(tree, node))

    @rule(which=which, share=st.floats(0, 1))
    def truncate(self, which: int, share: float) -> None:
        text = self.text(which)
        length = round(share * len(text.tokens))
        text.sequence.truncate(length)
        del text.tokens[length:]

    @rule(which=which, num_tokens=st.integers(0, 60))
    def reserve(self, which: int, num_tokens: int) -> None:
        self.text(which).sequence.reserve(num_tokens)
        free = self.engine.free
        self.text(which).sequence.reserve(num_tokens)
        assert self.engine.free == free, "what is reserved fits"

    @rule(which=which)
    def reserve_too_much(self, which: int) -> None:
        free = self.engine.free
        with pytest.raises(CacheFullError):
            self.text(which).sequence.reserve(self.engine.capacity + 1)
        assert self.engine.free == free

    @rule(which=which)
    def end(self, which: int) -> None:
        """The text ends; the next one begins in the same sequence."""
        text = self.text(which)
        text.sequence.close()
        text.tokens.clear()

    @rule(which=which, probe=st.integers(0, VOCAB - 1))
    def check(self, which: int, probe: int) -> None:
        text = self.text(which)
        got = forward(self.engine, Step(text.sequence, root_only(probe)))[0]
        assert_close(got, alone(self.engine, np.array([*text.tokens, probe])))

    @invariant()
    def lengths_are_those_of_the_texts(self) -> None:
        lengths = [text.sequence.length for text in self.texts]
        assert lengths == [len(text.tokens) for text in self.texts]
        assert max(lengths) <= self.engine.capacity - self.engine.free

    def teardown(self) -> None:
        try:
            for which in range(len(self.texts)):
                self.check(which, 7)
        finally:
            for text in self.texts:
                text.sequence.close()
        assert self.engine.free == self.engine.capacity


def test_traces_leave_every_text_as_a_fresh_read_would(engine: TargetEngine) -> None:
    class OfEngine(Trace):
        def __init__(self) -> None:
            super().__init__(engine)

    run_state_machine_as_test(OfEngine, settings=settings(max_examples=25, stateful_step_count=40, deadline=None))


def test_forks_part_in_the_middle_of_a_page_and_at_its_end(engine: TargetEngine) -> None:
    """The case that copying on writing is for, with every length around a page's end."""
    rng = np.random.default_rng(0)
    for length in (1, 31, 32, 33, 63, 64, 65):
        text = random_tokens(rng, length)
        with sequences(engine, text) as (first,), contextlib.closing(first.fork()) as second:
            for sequence, kept in ((second, length), (first, length), (second, length // 2), (first, length // 3)):
                sequence.truncate(kept)
                tail = random_tokens(rng, 40)
                read(engine, sequence, tail)
                with contextlib.closing(sequence.fork()) as third:
                    got = forward(engine, Step(third, root_only(5)))[0]
                assert_close(got, alone(engine, np.concatenate([text[:kept], tail, [5]])))
                sequence.truncate(kept)
            for sequence, kept in ((second, length // 2), (first, length // 3)):
                got = forward(engine, Step(sequence, root_only(6)))[0]
                assert_close(got, alone(engine, np.append(text[:kept], 6)))


def assert_full(small: TargetEngine, action: Callable[[], Any], *unchanged: TargetSequence) -> None:
    lengths = [sequence.length for sequence in unchanged]
    with pytest.raises(CacheFullError):
        action()
    assert [sequence.length for sequence in unchanged] == lengths


def test_a_full_cache_changes_nothing(small: TargetEngine) -> None:
    rng = np.random.default_rng(1)
    text, other = random_tokens(rng, 70), random_tokens(rng, 20)
    with sequences(small, text, other) as (long, short):
        free = small.free
        tree = chain(random_tokens(rng, 80))
        assert_full(small, lambda: long.reserve(80), long, short)
        assert_full(small, lambda: small.forward([Step(long, tree)]), long, short)
        assert small.free == free
        bush = Tree(random_tokens(rng, 90), np.array([-1] + [0] * 89))
        assert_full(small, lambda: long.reserve_tree(bush), long, short)
        assert_full(small, lambda: small.forward([Step(long, bush)]), long, short)
        assert small.free == free
        # Only one of the two fits: neither text has moved, whatever the pass had reserved before it failed.
        assert_full(small, lambda: small.forward([Step(short, root_only(3)), Step(long, tree)]), long, short)
        long_out, short_out = forward(small, Step(long, root_only(3)), Step(short, root_only(4)))
    assert_close(long_out, alone(small, np.append(text, 3)))
    assert_close(short_out, alone(small, np.append(other, 4)))


def test_a_cache_may_be_filled_to_its_last_token(small: TargetEngine) -> None:
    text = random_tokens(np.random.default_rng(2), SMALL)
    with sequences(small, text[:-1]) as (sequence,):
        out = forward(small, Step(sequence, root_only(int(text[-1]))))[0]
        sequence.commit([0])
        assert (sequence.length, small.free) == (SMALL, 0)
        assert_full(small, lambda: small.forward([Step(sequence, root_only(1))]), sequence)
    assert_close(out, alone(small, text))


def test_a_fork_that_no_longer_fits_leaves_the_other_whole(small: TargetEngine) -> None:
    text = random_tokens(np.random.default_rng(3), SMALL)
    forks: list[TargetSequence] = []
    with sequences(small, text) as (sequence,):

        def fork_and_write() -> None:
            """An engine that shares pages needs the first when the fork writes, one that copies needs all at once."""
            forks.append(sequence.fork())
            small.forward([Step(forks[-1], root_only(1))])

        assert_full(small, fork_and_write, sequence)
        for fork in forks:
            assert fork.length == SMALL
            fork.close()
        sequence.truncate(SMALL - 1)
        out = forward(small, Step(sequence, root_only(int(text[-1]))))[0]
    assert_close(out, alone(small, text))


@pytest.fixture(scope="module")
def both(tiny_artifact_fp32: Path, tiny_checkpoint: Path) -> tuple[TargetEngine, TargetEngine]:
    """The tiny checkpoint in OpenVINO and in numpy."""
    return openvino_target(tiny_artifact_fp32, CAPACITY), NumpyTarget.from_checkpoint(
        tiny_checkpoint, capacity=CAPACITY
    )


@settings(max_examples=15, deadline=None)
@given(drawn=st.lists(st.tuples(texts(0, 90), feeds()), min_size=1, max_size=3))
def test_both_engines_agree(both: tuple[TargetEngine, TargetEngine], drawn: list[tuple[Int64s, Tree]]) -> None:
    outs = []
    for engine in both:
        with sequences(engine, *(past for past, _ in drawn)) as opened:
            steps = [Step(sequence, tree) for sequence, (_, tree) in zip(opened, drawn, strict=True)]
            outs.append(forward(engine, *steps))
    for got, expected in zip(*outs, strict=True):
        assert_close(got, expected, AGREEMENT)


def test_the_numpy_engine_is_transformers_llama(tmp_path: Path) -> None:
    """With a tied head and other sizes than the tiny checkpoint's, which the agreement above is about."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dovetail.export.quiet import quiet_torch

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=50,
        tie_word_embeddings=True,
        initializer_range=0.3,
        rms_norm_eps=1e-5,
    )
    with quiet_torch():
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(tmp_path)
    text = np.random.default_rng(4).integers(0, 50, 60)
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(text[None]), output_hidden_states=True)
    target = NumpyTarget.from_checkpoint(tmp_path, capacity=64)
    got = target.forward([Step(target.sequence(), chain(text))])[0]
    assert_close(got, StepOutput(out.logits[0].numpy(), out.hidden_states[-1][0].numpy()), AGREEMENT)
