"""Proves the Python API on a tiny artifact in the real engines: every kind of prompt, streams, conversations that
reuse their cache, cancelling, failing engines; and that thousands of generations leak neither pages, draft rows nor
memory. Threads and open streams are in test_streams.py.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.runtime import load
from dovetail.runtime.decoding.feed import Request
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.drafts.onnxruntime_graph import OnnxRuntimeGraph
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.errors import ContextOverflowError, DeviceError, TargetError, UserError
from dovetail.runtime.hardware.devices import cuda_driver
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.targets.openvino.engine import OpenVinoTarget
from dovetail.runtime.trees.shape import TreeShape

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)
PROMPT = "def main(argv):\n    return"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_new_tokens": 24, "ignore_eos": True}


def make(path: Path, **settings: Any) -> Pipeline:
    settings = {"numerics": "exact", "ctx_size": 256, "tree": TreeShape(8, 3, 3), "chat_template": TEMPLATE, **settings}
    return load(path, **settings)


@pytest.fixture(scope="module")
def pipe(tiny_artifact: Path) -> Iterator[Pipeline]:
    with make(tiny_artifact) as loaded:
        yield loaded
        assert_nothing_is_taken(loaded)


def assert_nothing_is_taken(pipe: Pipeline) -> None:
    """No page of the target's cache, no row of the draft's."""
    assert pipe.target.free == pipe.target.capacity
    assert pipe.draft is None or pipe.draft.pool.num_free == pipe.draft.pool.max_blocks


def test_text_ids_and_messages_are_prompts(pipe: Pipeline) -> None:
    by_text = pipe.generate(PROMPT, **SAMPLED)
    by_ids = pipe.generate(pipe.tokenizer.encode(PROMPT), **SAMPLED)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.text == pipe.tokenizer.decode(by_text.token_ids)
    messages = [{"role": "user", "content": "hello"}]
    by_messages = pipe.generate(messages, **SAMPLED)
    rendered = pipe.tokenizer.encode("user: hello\nassistant:", add_special_tokens=False)
    assert by_messages.token_ids == pipe.generate(rendered, **SAMPLED).token_ids


def test_what_a_prompt_has_no_use_for_is_refused(pipe: Pipeline) -> None:
    for prompt, settings in (
        (PROMPT, {"tools": [{"type": "function"}]}),
        (PROMPT, {"chat_template_kwargs": {"a": 1}}),
        ([1, 2], {"chat_template_kwargs": {"a": 1}}),
        ([{"role": "user", "content": "x"}], {"parse_special": True}),
        ([1, 2], {"parse_special": True}),
        ([{"role": "user", "content": "x"}], {"tools": [{"type": "function"}]}),  # the template does not name them
    ):
        with pytest.raises(UserError, match=r"drop (it|them)$"):
            pipe.generate(prompt, **settings, **SAMPLED)


def test_control_tokens_in_a_text_may_be_meant(pipe: Pipeline) -> None:
    assert pipe.encode("a<|endoftext|>b").count(0) == 1, "the tokenizer's own, in front"
    assert pipe.encode("a<|endoftext|>b", parse_special=True).count(0) == 2
    one, other = (pipe.generate(text, parse_special=True, **SAMPLED) for text in ("<|endoftext|>", "a<|endoftext|>"))
    assert (one.prompt_tokens, other.prompt_tokens) == (1, 3)


def test_several_prompts_and_several_answers(pipe: Pipeline) -> None:
    one, two = pipe.generate([PROMPT, "import os"], **SAMPLED)
    assert one.token_ids == pipe.generate(PROMPT, **SAMPLED).token_ids
    assert two.token_ids == pipe.generate("import os", **SAMPLED).token_ids
    answers = pipe.generate(PROMPT, num_return_sequences=3, **SAMPLED)
    assert isinstance(answers, list)
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    assert answers[0].token_ids == one.token_ids


def test_a_stream_says_what_generate_says(pipe: Pipeline) -> None:
    whole = pipe.generate(PROMPT, logprobs=2, **SAMPLED)
    stream = pipe.stream(PROMPT, logprobs=2, **SAMPLED)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [flag for chunk in chunks for flag in chunk.drafted] == whole.drafted
    assert [entry for chunk in chunks for entry in chunk.logprobs] == whole.logprobs
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(whole.logprobs) == len(whole.token_ids)
    document = whole.as_dict()
    for name, value in document.items():
        if name != "logprobs":  # objects there, dictionaries in the document
            assert getattr(whole, name) == value
    assert document["completion_tokens"] == 24
    assert sum(document["accept_histogram"]) == document["rounds"]


def test_eos_ends_a_text_and_min_new_tokens_holds_it_off(pipe: Pipeline) -> None:
    settings = {**SAMPLED, "ignore_eos": False, "max_new_tokens": 60}
    free = pipe.generate(PROMPT, **{**settings, "ignore_eos": True})
    eos = free.token_ids[5]
    ended = pipe.generate(PROMPT, eos_token_id=[eos], **settings)
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert ended.text == pipe.tokenizer.decode(ended.token_ids[:-1])
    held = pipe.generate(PROMPT, eos_token_id=[eos], min_new_tokens=40, **settings)
    assert len(held.token_ids) >= 40


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_end_a_text_across_token_borders(pipe: Pipeline, include: bool) -> None:
    free = pipe.generate(PROMPT, **SAMPLED)
    stop = free.text[9:13]
    assert stop not in free.text[:9]
    ended = pipe.generate(PROMPT, stop_strings=[stop], include_stop_str_in_output=include, **SAMPLED)
    end = free.text.index(stop)
    assert ended.text == free.text[: end + len(stop) if include else end]
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: len(ended.token_ids)]
    assert stop in pipe.tokenizer.decode(ended.token_ids)
    assert stop not in pipe.tokenizer.decode(ended.token_ids[:-1])


@pytest.mark.parametrize("draft", ["artifact", "none"])
def test_a_conversation_that_reuses_its_cache_says_what_a_fresh_one_says(tiny_artifact: Path, draft: Any) -> None:
    pipe = make(tiny_artifact, draft=draft, sequences=2)
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
            messages.append({"role": "assistant", "content": reused.text})
        conversation.reset()
        assert pipe.stream(PROMPT, conversation=conversation, **SAMPLED).finish().reused_tokens == 0
    assert_nothing_is_taken(pipe)


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_draft_that_failed_in_one_turn_costs_the_next_nothing_but_speed(
    tiny_artifact: Path, fault: str, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    pipe = make(tiny_artifact, sequences=2)
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
        make(tiny_artifact) as other,
        other.conversation() as conversation,
        pytest.raises(UserError, match="one of this pipeline, got another's"),
    ):
        pipe.stream(PROMPT, conversation=conversation)


def test_a_closed_pipeline_says_so(tiny_artifact: Path) -> None:
    pipe = make(tiny_artifact)
    conversation = pipe.conversation()
    stream, unread, never_begun = (pipe.stream(PROMPT, **SAMPLED) for _ in range(3))
    began = next(stream).token_ids
    next(unread)
    pipe.close()
    pipe.close()
    for one in (stream, unread):
        done = one.finish()
        assert (done.finish_reason, done.token_ids[: len(began)]) == ("cancelled", began)
    with pytest.raises(UserError, match="expected an open pipeline"):
        next(never_begun)
    with pytest.raises(UserError, match="expected an open pipeline"):
        pipe.generate(PROMPT)
    with pytest.raises(UserError, match="expected an open pipeline"):
        next(pipe.stream(PROMPT, conversation=conversation))
    conversation.close()


class MineError(Exception):
    """The caller's own."""


def raise_over_a_stream(pipe: Pipeline) -> None:
    with pipe.conversation() as conversation:  # the stream has no block of its own
        for _ in pipe.stream(PROMPT, conversation=conversation, **SAMPLED):
            raise MineError


def raise_beside_a_stream(pipe: Pipeline) -> None:
    with pipe.conversation() as conversation:
        stream = pipe.stream(PROMPT, conversation=conversation, **SAMPLED)
        next(stream)
        raise MineError


def raise_over_many(pipe: Pipeline) -> None:
    for _ in pipe.generate_many([Request(PROMPT)] * 3):
        raise MineError


def raise_out_of_a_pipeline(artifact: Path) -> None:
    with make(artifact) as pipe:
        raise_beside_a_stream(pipe)


@pytest.mark.parametrize("work", [raise_over_a_stream, raise_beside_a_stream, raise_over_many])
def test_the_readers_own_error_comes_through_the_blocks_around_it(
    pipe: Pipeline, work: Callable[[Pipeline], None]
) -> None:
    with pytest.raises(MineError) as raised:
        work(pipe)
    del raised  # its traceback holds the stream
    assert pipe.target.free == pipe.target.capacity
    assert pipe.generate(PROMPT, **SAMPLED).finish_reason == "length"


def test_so_it_does_with_the_pipeline_that_ends(tiny_artifact: Path) -> None:
    with pytest.raises(MineError):
        raise_out_of_a_pipeline(tiny_artifact)


def test_an_idle_conversation_gives_its_pages_to_who_needs_them_and_reads_again(tiny_artifact: Path) -> None:
    with make(tiny_artifact, sequences=1) as pipe, pipe.conversation() as conversation:
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


def test_cancel_ends_after_the_round_and_close_at_once(pipe: Pipeline) -> None:
    stream = pipe.stream(PROMPT, **SAMPLED)
    next(iter(stream))
    stream.cancel()
    assert len(list(stream)) == 1
    assert stream.finish().finish_reason == "cancelled"
    stream = pipe.stream(PROMPT, **SAMPLED)
    first = next(iter(stream))
    stream.close()
    assert stream.finish().token_ids == first.token_ids
    assert stream.finish().finish_reason == "cancelled"


def test_a_consumer_that_stops_reading_frees_its_blocks(pipe: Pipeline) -> None:
    gc.disable()  # dropping the stream is enough
    try:
        read_one_chunk(pipe)
        pipe.engine.sweep()  # as every stream does that is opened, and every step
        assert_nothing_is_taken(pipe)
        assert pipe.generate(PROMPT, **SAMPLED).token_ids
    finally:
        gc.enable()


def read_one_chunk(pipe: Pipeline) -> None:
    for chunk in pipe.stream(PROMPT, **SAMPLED):
        assert chunk.token_ids
        break


def test_who_has_the_whole_context_is_not_told_to_raise_it(tiny_artifact: Path) -> None:
    with load(tiny_artifact, draft="none") as whole:
        for prompt, count in (([5] * 512, 1), ([5] * 500, 13)):
            with pytest.raises(ContextOverflowError) as raised:
                whole.generate(prompt, max_new_tokens=count)
            assert "ctx_size" not in str(raised.value)


def test_prompts_of_numpy_are_taken(pipe: Pipeline) -> None:
    expected = pipe.generate([5, 6, 7], **SAMPLED).token_ids
    for prompt in (np.array([5, 6, 7]), [np.int64(5), np.int32(6), 7], np.array([5, 6, 7], np.uint16)):
        assert pipe.generate(prompt, **SAMPLED).token_ids == expected
    for many in (np.array([[5, 6, 7]] * 2), [np.array([5, 6, 7]), [5, 6, 7]]):
        assert [done.token_ids for done in pipe.generate(many, **SAMPLED)] == [expected] * 2
    with pytest.raises(UserError, match="token ids from 0"):
        pipe.generate(np.array([5.0]))


def test_the_artifacts_own_limits_give_way_to_the_context_and_to_the_callers(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lengths(own: GenerationConfig, **controls: Any) -> int:
        monkeypatch.setattr(pipe.tokenizer, "generation", own)
        return len(pipe.generate([5] * 200, temperature=0, ignore_eos=True, **controls).token_ids)

    assert lengths(GenerationConfig(max_new_tokens=7)) == 7
    assert lengths(GenerationConfig(max_new_tokens=4096)) == 56
    assert lengths(GenerationConfig(max_length=210)) == 10
    assert lengths(GenerationConfig(max_length=4096)) == 56
    assert lengths(GenerationConfig(max_length=210), max_new_tokens=12) == 12
    assert lengths(GenerationConfig(max_new_tokens=7), max_new_tokens=9) == 9
    assert lengths(GenerationConfig(min_new_tokens=9), max_new_tokens=5) == 5
    for controls in ({"max_length": 300}, {"max_length": 200}, {"max_new_tokens": 60}):
        with pytest.raises(ContextOverflowError):
            lengths(GenerationConfig(), **controls)


def test_the_context_is_never_cut_silently(pipe: Pipeline) -> None:
    with pytest.raises(ContextOverflowError, match=r"context of 256 tokens, got \d+ of prompt and 300 to generate"):
        pipe.generate(PROMPT, max_new_tokens=300)
    with pytest.raises(ContextOverflowError):
        pipe.generate([5] * 256)
    with pytest.raises(ContextOverflowError, match=r"56 are left: .* -1, .* raise ctx_size \(the model's limit: 512\)"):
        pipe.generate([5] * 200, max_new_tokens=57)
    everything = pipe.generate([5] * 200, max_new_tokens=-1, temperature=0, ignore_eos=True)
    assert (len(everything.token_ids), everything.finish_reason) == (56, "length")
    filled = pipe.generate([5] * 200, max_new_tokens=56, temperature=0, ignore_eos=True)
    assert len(filled.token_ids) == 56
    assert len(pipe.generate([5] * 200, temperature=0, ignore_eos=True).token_ids) == 56


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "at least one token"),
        ([], {}, "at least one token"),
        ([1, -1], {}, "token ids from 0"),
        ([10**9], {}, "token ids from 0"),
        ([True], {}, "token ids from 0"),
        (3, {}, "expected text, token ids or messages"),
        (b"text", {}, "got bytes"),
        ("\ud800", {}, "UTF-8"),
        ("a\0b", {}, "NUL"),
        ([{"role": "user"}], {}, "give it a content"),
        ([{"content": "x"}], {}, "give it a role"),
        ([{"role": "user", "content": object()}], {}, "JSON"),
        (PROMPT, {"temperature": -1}, "temperature: expected"),
        (PROMPT, {"temprature": 1}, "got 'temprature'"),
        (PROMPT, {"eos_token_id": 512, "min_new_tokens": 3}, "eos_token_id: expected token ids below"),
        (PROMPT, {"num_return_sequences": 2}, "expected a temperature above 0"),
        (PROMPT, {"logit_bias": {10**8: 1.0}}, "logit_bias: expected token ids below"),
    ],
)
def test_bad_input_is_one_clear_error_and_the_pipeline_goes_on(
    pipe: Pipeline, prompt: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        pipe.generate(prompt, **settings)
    assert "\n" not in str(raised.value)
    assert_nothing_is_taken(pipe)
    assert pipe.generate(PROMPT, **SAMPLED).token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"threads": 0},
        {"ctx_size": 1},
        {"ctx_size": 10**6},
        {"sequences": 0},
        {"threads": "4"},
        {"ctx_size": 64.5},
        {"draft": "bogus"},
        {"draft_memory_limit": 2**20},
        {"numerics": "bogus"},
    ],
)
def test_bad_settings_are_refused(tiny_artifact: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected"):
        make(tiny_artifact, **settings)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu", "cuda:x"])
def test_a_draft_device_that_is_not_there_is_refused(tiny_artifact: Path, device: str) -> None:
    if device.startswith("cuda") and cuda_driver():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(DeviceError, match=r"^draft_device"):
        make(tiny_artifact, draft_device=device)


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_draft_session_that_fails_in_the_middle_changes_no_token(
    tiny_artifact: Path, fault: str, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    pipe = make(tiny_artifact)
    expected = pipe.generate(PROMPT, **SAMPLED)
    assert pipe.draft is not None
    healthy, calls = OnnxRuntimeGraph.run, 0

    def failing(graph: OnnxRuntimeGraph, asked: Sequence[DraftCall]) -> list[Children]:
        nonlocal calls
        calls += 1
        out = healthy(graph, asked)
        if calls > 5 and fault == "raises":
            raise RuntimeError("device lost")
        if calls > 5:
            out[0].log_probs[:] = np.nan
        return out

    monkeypatch.setattr(OnnxRuntimeGraph, "run", failing)
    got = pipe.generate(PROMPT, **SAMPLED)
    assert got.token_ids == expected.token_ids
    assert got.draft_failure is not None
    assert sum(line.startswith("the draft failed") for line in told.messages) == 1
    assert expected.draft_failure is None


def test_nan_from_the_target_is_an_error_and_frees_the_blocks(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make(tiny_artifact)
    forward, calls = OpenVinoTarget.forward, 0

    def failing(self: OpenVinoTarget, steps: Any, rows: int) -> Any:
        nonlocal calls
        calls += 1
        outputs = forward(self, steps, rows)
        if calls == 6:
            outputs[0].logits[:] = np.nan
        return outputs

    with monkeypatch.context() as patched:
        patched.setattr(OpenVinoTarget, "forward", failing)
        with pytest.raises(TargetError, match="expected finite logits"):
            pipe.generate(PROMPT, **SAMPLED)
    assert_nothing_is_taken(pipe)
    assert pipe.generate(PROMPT, **SAMPLED).finish_reason == "length"


def test_three_thousand_short_generations_leak_nothing(tiny_artifact: Path) -> None:
    """A generation leaves less than one Python object and less than a kilobyte behind, and one that does is noticed."""
    pipe = make(tiny_artifact, numerics="fast")
    page, kept = 4096, []

    def growth(count: int, keep: int) -> tuple[float, float]:
        """(blocks of Python's allocator, bytes of resident memory) a generation, over `count` that keep some bytes."""
        before = sys.getallocatedblocks(), resident_pages()
        for seed in range(count):
            pipe.generate([5, 9, 7], temperature=1.0, seed=seed, max_new_tokens=3, ignore_eos=True)
            if keep:
                kept.append(bytearray(keep))
        gc.collect()
        return (sys.getallocatedblocks() - before[0]) / count, (resident_pages() - before[1]) * page / count

    growth(1000, keep=0)  # caches of all kinds fill
    blocks, size = (
        min(pair) for pair in zip(growth(750, keep=0), growth(750, keep=0), strict=True)
    )  # one may be noise
    planted_blocks, planted_size = growth(500, keep=20_000)
    print(f"a generation leaves {blocks:.3f} blocks and {size:.0f} bytes behind")
    assert blocks < 0.5 < planted_blocks
    assert size < 1000 < planted_size
    assert_nothing_is_taken(pipe)


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_matches_that_fail_end_no_text(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tiny_artifact, numerics="exact", draft="none", ctx_size=128) as pipe:
        expected = pipe.generate(["one", "two"], max_new_tokens=12, ignore_eos=True)

    def fail(*arguments: object) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(LookupDraft, "grow", fail)
    with load(tiny_artifact, numerics="exact", draft="lookup", ctx_size=128) as pipe:
        texts = pipe.generate(["one", "two"], max_new_tokens=12, ignore_eos=True)
    assert [text.token_ids for text in texts] == [text.token_ids for text in expected]
    assert {text.finish_reason for text in texts} == {"length"}
