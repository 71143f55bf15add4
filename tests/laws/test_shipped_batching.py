"""Proves the law of test_batching.py of the shipped artifact, in `fast` numerics: bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from campaign import played
from hypothesis import given, settings
from hypothesis import strategies as st
from traces.player import Moments
from traces.settings import TRACE_SETTINGS

from dovetail.runtime import load
from dovetail.runtime.decoding import round_planner
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.evaluation.standard_library import held_out_files
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.sampling.config import GenerationConfig

pytestmark = pytest.mark.usefixtures("quiet_drafts")


@pytest.fixture(scope="module")
def shipped(shipped_artifact: Path) -> Iterator[Pipeline]:
    """With its draft and matches, eight texts at a time, and a cache that holds two long ones."""
    with load(shipped_artifact, ctx_size=256, sequences=2) as pipe:
        pipe.engine._max_texts = 8
        yield pipe


@pytest.fixture(scope="module")
def shipped_plain(shipped_artifact: Path) -> Iterator[Pipeline]:
    with load(shipped_artifact, ctx_size=256, draft="none") as pipe:
        yield pipe


@dataclasses.dataclass(frozen=True)
class CodeText:
    """One request."""

    file: int
    length: int  # tokens of the prompt
    config: GenerationConfig
    arrival: int
    answers: int
    is_cancelled: bool


CODE_TEXTS = st.builds(
    CodeText,
    file=st.integers(0, 19),
    length=st.integers(1, 120),
    config=st.builds(
        GenerationConfig,
        max_new_tokens=st.integers(1, 20),
        temperature=st.sampled_from([0.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        seed=st.integers(0, 1000),
        ignore_eos=st.just(True),
        logprobs=st.just(3),
    ),
    arrival=st.integers(0, 8),
    answers=st.integers(1, 2),
    is_cancelled=st.sampled_from([False, False, False, True]),
)


@settings(TRACE_SETTINGS, max_examples=played(8, of=20))
@given(
    st.lists(CODE_TEXTS, min_size=1, max_size=5),
    st.frozensets(st.integers(0, 12), max_size=3),
    st.frozensets(st.integers(0, 40), max_size=2),
    st.sampled_from([5, 32, 64]),
)
def test_so_it_is_with_the_shipped_artifact(
    shipped: Pipeline,
    shipped_plain: Pipeline,
    texts: list[CodeText],
    preemptions: frozenset[int],
    interrupts: frozenset[int],
    prompt_tokens_beside: int,
) -> None:
    codes = [shipped.encode(text[:2000]) for _, text in itertools.islice(held_out_files(), 20)]
    moment, engine, target = Moments(interrupts), shipped.engine, shipped.target
    answers: list[tuple[CodeText, int, Stream]] = []
    forward, step = type(target).forward, 0

    def interrupted(self: Any, *arguments: Any) -> Any:
        moment()
        out = forward(self, *arguments)
        moment()
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(target), "forward", interrupted)
        patch.setattr(round_planner, "PROMPT_TOKENS_BESIDE", prompt_tokens_beside)
        while step <= 8 or not engine.is_idle:
            for text in texts:
                if text.arrival == step:
                    ids = codes[text.file % len(codes)][: text.length]
                    count = text.answers if text.config.temperature else 1
                    streams = [shipped.stream(ids, text.config, sequence=number) for number in range(count)]
                    answers += [(text, number, stream) for number, stream in enumerate(streams)]
                    streams[0].share_prompt(streams[1:])
                elif text.is_cancelled and text.arrival + 5 == step:
                    for other, _, stream in answers:
                        if other is text:
                            stream.cancel()
            if step in preemptions and len(engine._running) > 1:
                engine._preempt(engine._running[-1])
            with contextlib.suppress(KeyboardInterrupt):
                engine.step()
            step += 1
    assert target.free == target.capacity
    assert shipped.draft is not None
    assert shipped.draft.pool.num_free == shipped.draft.pool.max_blocks
    for text, number, stream in answers:
        done = stream.finish()
        ids = codes[text.file % len(codes)][: text.length]
        expected = shipped_plain.stream(ids, text.config, sequence=number).finish()
        assert done.token_ids == expected.token_ids[: len(done.token_ids)]
        assert done.logprobs == expected.logprobs[: len(done.token_ids)]
        assert done.finish_reason in (("length", "cancelled") if text.is_cancelled else ("length",))
        assert len(done.token_ids) == text.config.max_new_tokens or text.is_cancelled
