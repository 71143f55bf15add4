"""Proves the Python API on a tiny artifact in the real engines: every kind of prompt, streams, limits, cancelling, and
what is refused. Conversations are in test_conversations.py, failing engines in test_failures.py, threads and open
streams in test_streams.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.tiny_pipeline import PROMPT, SAMPLED, assert_nothing_is_taken, open_tiny

from dovetail.runtime import load
from dovetail.runtime.errors import ContextOverflowError, DeviceError, UserError
from dovetail.runtime.hardware.devices import cuda_driver
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.sampling.config import GenerationConfig


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


def test_a_closed_pipeline_says_so(tiny_artifact: Path) -> None:
    pipe = open_tiny(tiny_artifact)
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
        open_tiny(tiny_artifact, **settings)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu", "cuda:x"])
def test_a_draft_device_that_is_not_there_is_refused(tiny_artifact: Path, device: str) -> None:
    if device.startswith("cuda") and cuda_driver():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(DeviceError, match=r"^draft_device"):
        open_tiny(tiny_artifact, draft_device=device)
