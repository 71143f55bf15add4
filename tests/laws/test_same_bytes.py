"""Proves the promise bit for bit, in `fast` and in `exact`: a text's token ids and log-probabilities are those of plain
decoding, alone and token by token, whatever guesses and however wide its trees are, however its prompt is cut, whoever
shares its passes, and however often it is preempted. Bugs in how rows are laid out are noticed. That it is so for every
family and weight format, test_families.py proves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign import played
from fakes.drafts import FakeDraft, FakeGraph, Guess, Texts, knows, misses
from hypothesis import given, settings
from hypothesis import strategies as st
from traces.settings import TRACE_SETTINGS

from dovetail.runtime import load
from dovetail.runtime.decoding import round_planner
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.drafts.base import Draft
from dovetail.runtime.evaluation.standard_library import held_out_files
from dovetail.runtime.policies.base import OWN_ESTIMATES, Policy
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import TokenLogprobs
from dovetail.runtime.targets.base import Step, TargetEngine
from dovetail.runtime.targets.openvino import engine as openvino_engine
from dovetail.runtime.targets.openvino.engine import OpenVinoSequence, OpenVinoTarget
from dovetail.runtime.targets.openvino.inputs import Inputs
from dovetail.runtime.targets.openvino.layout import MAX_FILLING, Rows, filling
from dovetail.runtime.targets.row_check import check_rows
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Float32s, chain

pytestmark = pytest.mark.usefixtures("quiet_drafts")

Written = tuple[list[int], list[TokenLogprobs]]
"""What must be the same."""

NEW_TOKENS = 20
LENGTHS = (1, 2, 31, 32, 33, 65)  # tokens of prompts: around a page and a block
CONTROLS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 1.5, "top_k": 20, "min_p": 0.01, "no_repeat_ngram_size": 2, "logit_bias": {5: 2.0}},
]
POLICIES = [
    Policy("plain"),
    Policy("lookup"),
    Policy("fixed", TreeShape(4, 3, 1), is_wish=True),
    Policy("fixed", TreeShape(8, 3, 3), gain=2.0),
    Policy("fixed", TreeShape(24, 6, 4), is_wish=True),
    Policy("fixed", TreeShape(64, 5, 8), is_wish=True),
    Policy("adaptive", TreeShape(24, 6, 4), OWN_ESTIMATES, gain=2.0),
]


class Pair:
    """An artifact with all that may change nothing, and plain."""

    def __init__(self, artifact: Path, numerics: str) -> None:
        self.pipe = load(artifact, numerics=numerics, ctx_size=256, sequences=2)
        self._alone = load(artifact, numerics=numerics, ctx_size=256, draft="none")
        self._expected: dict[tuple[Sequence[int], str], Written] = {}

    @functools.cached_property
    def codes(self) -> list[list[int]]:
        """Texts that neither model was trained on."""
        return [self.pipe.encode(text[:1000]) for _, text in itertools.islice(held_out_files(), 6)]

    def plain(self, prompt: Sequence[int], config: GenerationConfig) -> Written:
        """By plain decoding, alone."""
        key = tuple(prompt), repr(config.with_changes(max_new_tokens=NEW_TOKENS))
        if key not in self._expected:
            done = self._alone.generate(prompt, config, max_new_tokens=NEW_TOKENS)
            self._expected[key] = done.token_ids, done.logprobs
        tokens, logprobs = self._expected[key]
        return tokens[: config.max_new_tokens], logprobs[: config.max_new_tokens]

    def close(self) -> None:
        self.pipe.close()
        self._alone.close()


@pytest.fixture(scope="module", params=["fast", "exact"])
def numerics(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    return str(request.param)


@pytest.fixture(scope="module")
def shipped(shipped_artifact: Path, numerics: str) -> Iterator[Pair]:
    pair = Pair(shipped_artifact, numerics)
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def tiny(tiny_artifact: Path, numerics: str) -> Iterator[Pair]:
    pair = Pair(tiny_artifact, numerics)
    yield pair
    pair.close()


# The law.


@dataclasses.dataclass(frozen=True)
class Text:
    """One request."""

    file: int
    length: int
    config: GenerationConfig
    policy: Policy
    arrival: int = 0  # steps before it

    def prompt(self, pair: Pair) -> list[int]:
        code = pair.codes[self.file % len(pair.codes)]
        return code[: self.length]


@dataclasses.dataclass(frozen=True)
class Company:
    """Texts that are made together."""

    texts: list[Text]
    max_texts: int = 8
    prompt_tokens: int = 256  # of a pass
    prompt_tokens_beside: int = 64
    preemptions: frozenset[int] = frozenset()  # steps before which the newest text is preempted
    pages: int | None = None  # that the cache is left with, while texts are let in as if there were more


def holds(pair: Pair, company: Company) -> int:
    """Assert the law; returns how many drafted tokens were accepted."""
    engine, target, step = pair.pipe.engine, pair.pipe.target, 0
    assert isinstance(target, OpenVinoTarget)
    streams = []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if company.pages is not None:
            taken = target.pool.take(target.pool.num_free - company.pages)
            stack.callback(target.pool.give_back, taken)
            patch.setattr(engine, "_has_room", lambda tokens: True)
        patch.setattr(engine, "_max_texts", company.max_texts)
        patch.setattr(round_planner, "PROMPT_TOKENS", company.prompt_tokens)
        patch.setattr(round_planner, "PROMPT_TOKENS_BESIDE", company.prompt_tokens_beside)
        while step <= max(text.arrival for text in company.texts) or not engine.is_idle:
            for text in company.texts:
                if text.arrival == step:
                    stream = pair.pipe.stream(text.prompt(pair), text.config, policy=text.policy)
                    stream.open()
                    streams.append((text, stream))
            if step in company.preemptions and len(engine._running) > 1:
                engine._preempt(engine._running[-1])
            engine.step()
            step += 1
    accepted = 0
    for text, stream in streams:
        done = stream.finish()
        assert (done.token_ids, done.logprobs) == pair.plain(text.prompt(pair), text.config), text
        accepted += done.totals.accepted_tokens
    assert target.free == target.capacity, "a page leaked"
    return accepted


TEXTS = st.builds(
    Text,
    file=st.integers(0, 2),
    length=st.sampled_from(LENGTHS),
    config=st.builds(
        lambda controls, count, seed: GenerationConfig(
            max_new_tokens=count, seed=seed, logprobs=3, ignore_eos=True, **controls
        ),
        st.sampled_from(CONTROLS),
        st.integers(1, NEW_TOKENS),
        st.integers(0, 1),
    ),
    policy=st.sampled_from(POLICIES),
    arrival=st.integers(0, 6),
)
COMPANIES = st.builds(
    Company,
    texts=st.lists(TEXTS, min_size=1, max_size=8),
    max_texts=st.sampled_from([1, 3, 8]),
    prompt_tokens=st.sampled_from([1, 7, 33, 256]),
    prompt_tokens_beside=st.sampled_from([1, 5, 32, 64]),
    preemptions=st.frozensets(st.integers(0, 12), max_size=3),
    pages=st.sampled_from([None, 8, 12]),
)


def test_any_company_on_the_shipped_artifact(shipped: Pair) -> None:
    @settings(TRACE_SETTINGS, max_examples=played(5, of=10))
    @given(COMPANIES)
    def law(company: Company) -> None:
        holds(shipped, company)

    law()


def test_any_company_on_random_weights(tiny: Pair) -> None:
    @settings(TRACE_SETTINGS, max_examples=played(12, of=30))
    @given(COMPANIES)
    def law(company: Company) -> None:
        holds(tiny, company)

    law()


def eight(policy: Policy, **controls: Any) -> list[Text]:
    """Texts with prompts of all lengths."""
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, logprobs=3, ignore_eos=True, **controls)
    lengths = (*LENGTHS, 64, 100)
    return [Text(i, length, config, policy) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("controls", [CONTROLS[1], CONTROLS[2]], ids=["greedy", "sampled"])
def test_eight_texts_with_wide_trees_in_a_small_cache(shipped: Pair, controls: dict[str, Any]) -> None:
    """They push each other out, and a text whose branches find no room goes on with a chain."""
    preempted, preempt = [], TextSequence.preempt

    def counted(self: TextSequence) -> None:
        preempted.append(self.context)
        preempt(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextSequence, "preempt", counted)
        accepted = holds(shipped, Company(eight(POLICIES[5], seed=3, **controls), pages=11))
    assert accepted > 20, "a law about a draft that is never believed would prove nothing"
    assert len(preempted) > 2


@pytest.mark.parametrize(
    "engine",
    [
        {"draft": "lookup"},
        {"draft": "auto"},
        {"draft": "artifact", "tree": TreeShape(40, 4, 10), "sequences": 3},
    ],
    ids=["lookup", "auto", "wide"],
)
def test_a_list_of_prompts(engine: dict[str, Any], shipped: Pair, shipped_artifact: Path, numerics: str) -> None:
    """As users make them."""
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, logprobs=3, ignore_eos=True, temperature=0.8, seed=1)
    with load(shipped_artifact, numerics=numerics, ctx_size=256, **engine) as pipe:
        for count in (1, 2, 8):
            prompts = [text.prompt(shipped) for text in eight(Policy("plain"))][-count:]
            done = pipe.generate(prompts, config)
            assert [(one.token_ids, one.logprobs) for one in done] == [shipped.plain(one, config) for one in prompts]


def second_turns_hold(shipped: Pair) -> None:
    """Whether its pages were given up in between or not, what was drawn in the first turn stays drawn. That one ends
    with a stop string in the middle of a round; the second begins with what that round had drawn behind it.
    """
    pipe = shipped.pipe
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, logprobs=3, ignore_eos=True, temperature=0)
    ways = itertools.product(shipped.codes[:2], [".", "=", " "])
    for (code, stop), is_evicted in zip(ways, itertools.cycle([False, False, True])):
        prompt = code[:33]
        further, _ = shipped.plain(prompt, config)
        written = []
        for policy in (POLICIES[2], Policy("plain")):
            with pipe.conversation() as conversation:
                turn = {"conversation": conversation, "policy": policy}
                first = pipe.stream(prompt, config, stop_strings=[stop], **turn).finish()
                if is_evicted:
                    conversation.evict()
                follow_up = further[len(first.token_ids) :][:3] + code[-3:]
                second = pipe.stream([*prompt, *first.token_ids, *follow_up], config, **turn).finish()
                written.append((first.token_ids, first.logprobs, second.token_ids, second.logprobs))
        assert written[0] == written[1]


def test_a_second_turn(shipped: Pair) -> None:
    second_turns_hold(shipped)


def hides(text: Sequence[int], seed: int, vocab: int) -> Guess:
    """Knows the text to come, and hides it among tokens that are not, now here and now there."""

    def guess(before: Sequence[int]) -> Sequence[tuple[int, float]]:
        rng = np.random.default_rng([seed, len(before)])
        tokens = rng.choice(vocab, 4, replace=False).tolist()
        right = text[len(before)] if len(before) < len(text) else 0
        if right not in tokens:
            tokens[int(rng.integers(0, 4))] = right
        return [(token, 0.4 / 2**i) for i, token in enumerate(tokens)]

    return guess


class Failing(FakeDraft):
    """Fails now and then, as drafts that are given up do."""

    def grow(self, *arguments: Any, **others: Any) -> Any:
        if self.asked >= 2:
            raise RuntimeError("planted")
        return super().grow(*arguments, **others)


def test_drafts_that_know_that_err_and_that_fail(tiny: Pair) -> None:
    """Several texts, each with another draft, which has read the text before."""
    target = tiny.pipe.target
    vocab = target.info.vocab_size

    @settings(TRACE_SETTINGS, max_examples=played(12, of=30))
    @given(
        st.lists(st.tuples(st.sampled_from(LENGTHS), st.integers(0, 5)), min_size=1, max_size=5),
        st.sampled_from(CONTROLS),
        st.sampled_from([TreeShape(4, 3, 1), TreeShape(13, 4, 2), TreeShape(30, 5, 4)]),
        st.integers(0, 100),
    )
    def law(asked: list[tuple[int, int]], controls: dict[str, Any], shape: TreeShape, seed: int) -> None:
        config = GenerationConfig(seed=seed, logprobs=2, **controls)
        prompts = [tiny.codes[i % 6][:length] for i, (length, _) in enumerate(asked)]

        def written(drafts: Sequence[Draft | None], prompts: Sequence[list[int]], number: int = 0) -> list[Written]:
            texts = Texts(target, config, Policy("fixed", shape, is_wish=True), graph=FakeGraph())
            readers = texts.make([*[[1]] * number, *prompts], NEW_TOKENS, [*[None] * number, *drafts])[number:]
            return [(reader.tokens, reader.sequence._sampler.logprobs) for reader in readers]

        alone = [written([None], [prompt], number)[0] for number, prompt in enumerate(prompts)]
        drafts: list[Draft | None] = []
        for (_, kind), prompt, (tokens, _) in zip(asked, prompts, alone, strict=True):
            text = prompt + tokens
            guess = [knows(text, vocab=vocab), misses(text, vocab=vocab), hides(text, seed, vocab)][kind % 3]
            drafts.append(Failing(guess) if kind == 5 else FakeDraft(guess))
        assert written(drafts, prompts) == alone

    law()


# Bugs that are planted. What shows only where two kernels differ is no test where they do not.


def differing(target: TargetEngine) -> tuple[str, ...]:
    return check_rows(target).differing


def test_rows_are_the_same_in_any_company(shipped: Pair) -> None:
    assert not differing(shipped.pipe.target)


def test_a_pass_of_one_row_is_noticed(shipped: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(parts: list[Rows], rows: int, threads: int, pages: list[int]) -> Rows | None:
        return None

    monkeypatch.setattr(openvino_engine, "filling", nothing)
    if not differing(shipped.pipe.target):
        pytest.skip("here a pass of one row has the bits of one of several")
    with pytest.raises(AssertionError):
        holds(shipped, Company(eight(POLICIES[2], temperature=0.0)))


def test_one_row_through_the_lm_head_is_noticed(shipped: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Inputs.fill

    def once(self: Inputs, parts: list[Rows], logit_rows: list[int]) -> None:
        fill(self, parts, logit_rows[:1] if len(set(logit_rows)) == 1 else logit_rows)

    monkeypatch.setattr(Inputs, "fill", once)
    if not differing(shipped.pipe.target):
        pytest.skip("here the LM head gives one row the bits that it gives it among others")


def test_drawn_tokens_that_are_read_as_a_prompt_are_noticed(shipped: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    target, tokens = shipped.pipe.target, np.array(shipped.codes[0][:40])

    def behind(is_prompt: bool) -> Float32s:
        sequence = target.sequence()
        target.forward([Step(sequence, chain(tokens[:33]), [], is_prompt=True)])
        sequence.commit(range(33))
        target.forward([Step(sequence, chain(tokens[33:39]), [], is_prompt)])
        sequence.commit(range(6))
        logits = target.forward([Step(sequence, chain(tokens[39:]))])[0].logits.copy()
        sequence.close()
        return logits

    if np.array_equal(behind(True), behind(False)):
        pytest.skip("here attention gives a block's rows the bits of single ones")
    monkeypatch.setattr(TextSequence, "_is_drawn", lambda self, position: False)
    texts = eight(Policy("plain"), temperature=0.0)
    with pytest.raises(AssertionError):
        holds(shipped, Company(texts, preemptions=frozenset(range(6, 14))))


def test_tokens_behind_a_stop_string_that_are_kept_are_noticed(shipped: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextSequence, "keep", lambda self, count: None)
    with pytest.raises(AssertionError):
        second_turns_hold(shipped)


def keep_what_lies_there(self: OpenVinoSequence, path: Sequence[int]) -> None:
    self._drop_branches()
    self.table.length += len(path)


def keep_the_first_path(self: OpenVinoSequence, path: Sequence[int]) -> None:
    self._homes = None
    COMMIT(self, path)


def write_without_a_copy(self: OpenVinoSequence, copy: Any) -> None:
    pass


COMMIT = OpenVinoSequence.commit


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("commit", keep_what_lies_there),
        ("commit", keep_the_first_path),
        ("_copy", write_without_a_copy),
    ],
)
def test_branches_that_are_not_copied_are_noticed(
    shipped: Pair, name: str, mutant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVinoSequence, name, mutant)
    with pytest.raises(AssertionError):
        holds(shipped, Company(eight(POLICIES[5], temperature=0.0)))


@pytest.mark.parametrize("threads", [1, 2, 3, 128, 256])
def test_filling_has_room_in_its_pages(threads: int) -> None:
    root = Rows(np.zeros(1, np.int64), np.zeros(1, np.int64), 5, [0], are_alone=True)
    for rows in (0, 1, 2, 3, MAX_FILLING, MAX_FILLING + 1, MAX_FILLING + 2, 4096):
        filled = filling([root], rows, threads, [1, 2, 3, 4])
        assert filled is not None, "a pass of one row"
        assert len(filled) <= MAX_FILLING
        assert len(filled) > 1 or threads <= 2


def test_relaxed_acceptance_promises_nothing(shipped: Pair, shipped_artifact: Path, numerics: str) -> None:
    with load(shipped_artifact, numerics=numerics, ctx_size=256, acceptance="relaxed") as pipe:
        assert pipe.row_check is None
        if not differing(pipe.target):
            pytest.skip("here rows have the same bits in any layout")
