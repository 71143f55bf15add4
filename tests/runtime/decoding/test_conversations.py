"""Proves that a conversation that reuses its cache says what a fresh one says: behind turns that diverge, drafts that
failed, and when its pages were given up in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.tiny_pipeline import PROMPT, SAMPLED, assert_nothing_is_taken, open_tiny

from dovetail.runtime import load
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.drafts.onnxruntime_graph import OnnxRuntimeGraph
from dovetail.runtime.errors import UserError
from dovetail.runtime.pipeline import Pipeline


@pytest.mark.parametrize("draft", ["artifact", "none"])
def test_a_conversation_that_reuses_its_cache_says_what_a_fresh_one_says(tiny_artifact: Path, draft: Any) -> None:
    pipe = open_tiny(tiny_artifact, draft=draft, sequences=2)
    messages: list[dict[str, str]] = []
    with pipe.conversation() as conversation:
        for turn in range(4):
            messages.append({"role": "user", "content": f"question {turn}"})
            settings = {**SAMPLED, "seed": turn}
            reused = pipe.stream(messages, conversation=conversation, **settings).finish()
            fresh = pipe.generate(messages, **settings)
            assert reused.token_ids == fresh.token_ids
            assert fresh.reused_tokens == 0
            assert (reused.reused_tokens > 0) == (turn > 0)
            said = reused.text.replace("\0", "")  # which a random model says, and nobody may
            messages.append({"role": "assistant", "content": said})
        conversation.reset()
        assert pipe.stream(PROMPT, conversation=conversation, **SAMPLED).finish().reused_tokens == 0
    assert_nothing_is_taken(pipe)


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_draft_that_failed_in_one_turn_costs_the_next_nothing_but_speed(
    tiny_artifact: Path, fault: str, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    pipe = open_tiny(tiny_artifact, sequences=2)
    assert pipe.draft is not None
    healthy, calls = OnnxRuntimeGraph.run, 0

    def failing(graph: OnnxRuntimeGraph, asked: Sequence[DraftCall]) -> list[Children]:
        nonlocal calls
        calls += 1
        if calls == 3 and fault == "raises":
            raise RuntimeError("device lost")
        out = healthy(graph, asked)
        if calls == 3:
            out[0].log_probs[:] = np.nan
        return out

    text = pipe.tokenizer.encode(PROMPT)
    with pipe.conversation() as conversation:
        for turn in range(3):
            settings = {**SAMPLED, "seed": turn}
            with monkeypatch.context() as patched:
                patched.setattr(OnnxRuntimeGraph, "run", failing)
                got = pipe.stream(text, conversation=conversation, **settings).finish()
            assert got.token_ids == pipe.generate(text, **settings).token_ids
            assert got.reused_tokens == (
                len(text) - 4 if turn else 0
            )  # all but the three new tokens and the one before
            text = text + got.token_ids + [5, 6, 7]
    assert sum(line.startswith("the draft failed") for line in told.messages) == 1


def test_turns_that_diverge_leave_the_draft_as_a_fresh_text_would(pipe: Pipeline) -> None:
    """Not only the tokens: the accepted lengths too, so the draft's cache holds no pair of the old text."""
    first, second = [5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 300, 301, 302, 303]
    with pipe.conversation() as conversation:
        pipe.stream(first, conversation=conversation, **SAMPLED).finish()
        reused = pipe.stream(second, conversation=conversation, **SAMPLED).finish()
        assert reused.reused_tokens == 3
    fresh = pipe.generate(second, **SAMPLED)
    assert reused.token_ids == fresh.token_ids
    assert reused.drafted == fresh.drafted
    assert reused.accept_histogram == fresh.accept_histogram


def test_a_conversation_in_use_is_not_reset(pipe: Pipeline) -> None:
    conversation = pipe.conversation()
    with pipe.stream(PROMPT, conversation=conversation, **SAMPLED) as stream:
        next(stream)
        with pytest.raises(UserError, match="open stream"):
            conversation.reset()
        with pytest.raises(UserError, match="open stream"):
            next(pipe.stream(PROMPT, conversation=conversation, **SAMPLED))
    conversation.close()


def test_a_conversation_of_another_pipeline_is_refused(pipe: Pipeline, tiny_artifact: Path) -> None:
    with (
        open_tiny(tiny_artifact) as other,
        other.conversation() as conversation,
        pytest.raises(UserError, match="one of this pipeline, got another's"),
    ):
        pipe.stream(PROMPT, conversation=conversation)


def test_an_idle_conversation_gives_its_pages_to_who_needs_them_and_reads_again(tiny_artifact: Path) -> None:
    with open_tiny(tiny_artifact, sequences=1) as pipe, pipe.conversation() as conversation:
        first = pipe.stream([5] * 200, conversation=conversation, **SAMPLED).finish()
        assert pipe.target.capacity - pipe.target.free >= 200
        assert pipe.generate([5] * 220, max_new_tokens=30).token_ids
        assert pipe.target.free == pipe.target.capacity
        text = [5] * 200 + first.token_ids + [9, 9]
        again = pipe.stream(text, conversation=conversation, **{**SAMPLED, "max_new_tokens": 8}).finish()
        assert again.reused_tokens == 0
        assert again.token_ids == pipe.generate(text, **{**SAMPLED, "max_new_tokens": 8}).token_ids


TURNS = [
    "def read(path):\n    with open(path) as file:\n",
    "\n\n\nclass Queue:\n    def __init__(self, maxsize=0):\n",
    "\n    def get(self, block=True, timeout=None):\n",
    "\n",
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", ["auto", "none"])
def test_an_evicted_conversation_answers_bit_for_bit_as_one_that_was_not(
    shipped_artifact: Path, draft: Any, temperature: float
) -> None:
    """In fast numerics, log-probabilities included, with turns that go back behind the last answer and one that is
    cancelled while it is read.
    """
    controls = {"temperature": temperature, "max_new_tokens": 40, "ignore_eos": True, "logprobs": 2}
    with (
        load(shipped_artifact, draft=draft, ctx_size=1024, sequences=2, numerics="fast", profile=None) as pipe,
        pipe.conversation() as kept,
        pipe.conversation() as evicted,
    ):
        text = list[int]()
        for turn, more in enumerate(TURNS * 2):
            text = text + pipe.encode(more)
            if turn == 5:
                text = text[:-70] + pipe.encode("x = 3\n")
            assert evicted.evict() == (turn > 0)
            if turn == 6:
                for conversation in (kept, evicted):
                    with pipe.stream(text, conversation=conversation, **controls) as stream:
                        stream.open()
                        pipe.engine.step()
            expected, got = (
                pipe.stream(text, conversation=conversation, seed=turn, **controls).finish()
                for conversation in (kept, evicted)
            )
            assert got.token_ids == expected.token_ids
            assert got.logprobs == expected.logprobs
            assert (expected.reused_tokens > 0) == (turn > 0)
            assert (got.reused_tokens > 0) == (turn == 6), "what the cancelled stream had read"
            text = text + got.token_ids
        assert (expected.drafted_tokens > 0) == (draft != "none")
    assert_nothing_is_taken(pipe)
