"""Proves that every layout of a line is read as documented, that OpenAI bodies become the controls that they name, and
that a wrong line is refused in one line that says where and what; that a file is looked through without being held.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dovetail.runtime.batch.input_file import open_input
from dovetail.runtime.batch.line import MAX_LINE_BYTES, read_line
from dovetail.runtime.errors import UserError

USER = [{"role": "user", "content": "Hello"}]


def request(body: Any, url: str = "/v1/chat/completions", **changes: Any) -> bytes:
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body, **changes}).encode()


@pytest.mark.parametrize(
    ("entry", "line_id", "asked", "is_said"),
    [
        ({"prompt": "def f():", "id": "x"}, "x", "def f():", False),
        ({"prompt": "def f():", "entry_point": "f", "task_id": "HumanEval/0"}, "HumanEval/0", "def f():", False),
        ({"question": "How many?", "answer": "2"}, 7, "How many?", True),
        ({"question_id": 81, "turns": ["Write.", "Again."]}, 81, "Write.", True),
        ({"instruction": "Sort.", "input": "3 1", "id": None}, 7, "Sort.\n\n3 1", True),
        (
            {"instruction": "Sort.", "instances": [{"input": "3 1"}], "id": "seed_task_0"},
            "seed_task_0",
            "Sort.\n\n3 1",
            True,
        ),
        ({"custom_id": "c", "prompt": "Once"}, "c", "Once", False),
        ({"messages": USER, "id": 0}, 0, USER, False),
    ],
)
def test_layouts(entry: dict[str, Any], line_id: Any, asked: Any, is_said: bool) -> None:
    line = read_line(7, json.dumps(entry).encode(), False)
    assert line.error is None
    assert (line.id, line.asked, line.is_said, line.is_openai) == (line_id, asked, is_said, False)
    assert line.prompt(False) == asked
    assert line.prompt(True) == ([{"role": "user", "content": asked}] if is_said else asked)


@pytest.mark.parametrize(
    ("body", "controls"),
    [
        ({}, {}),
        ({"model": "m", "user": "u", "metadata": {"a": "b"}, "store": True, "stream": False, "tools": None}, {}),
        ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": None, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        (
            {"temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 2, "presence_penalty": 1, "frequency_penalty": -1},
            {
                "temperature": 0.5,
                "top_p": 0.9,
                "seed": 3,
                "num_return_sequences": 2,
                "presence_penalty": 1,
                "frequency_penalty": -1,
            },
        ),
        ({"stop": "\n"}, {"stop_strings": ["\n"]}),
        ({"stop": ["a", "b"]}, {"stop_strings": ["a", "b"]}),
        ({"logit_bias": {"50": -100}}, {"logit_bias": {50: -100}}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
        ({"logprobs": False}, {}),
        ({"top_k": 40, "min_p": 0.1, "ignore_eos": True}, {"top_k": 40, "min_p": 0.1, "ignore_eos": True}),
    ],
)
def test_openai_controls(body: dict[str, Any], controls: dict[str, Any]) -> None:
    line = read_line(1, request({"messages": USER, **body}), False)
    assert line.error is None
    assert (line.id, line.asked, line.is_openai, line.is_chat) == ("a", USER, True, True)
    assert line.controls == controls


def test_variables_of_the_chat_template() -> None:
    for given, read in (({"enable_thinking": False}, {"enable_thinking": False}), (None, {}), ({}, {})):
        line = read_line(1, request({"messages": USER, "chat_template_kwargs": given}), False)
        assert (line.error, line.controls, line.chat_template_kwargs) == (None, {}, read)


@pytest.mark.parametrize(("prompt", "asked"), [("x", "x"), (["x"], "x"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2])])
def test_openai_completions(prompt: Any, asked: Any) -> None:
    line = read_line(1, request({"prompt": prompt, "logprobs": 2, "echo": False}, "/v1/completions"), False)
    assert (line.error, line.asked, line.is_chat, line.controls) == (None, asked, False, {"logprobs": 2})


def test_contents_of_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    line = read_line(1, request({"messages": [{"role": "user", "content": parts}]}), False)
    assert line.asked == USER


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "x"', "expected one strict JSON document"),
        (b"\xff\xfe", "expected one strict JSON document"),
        (b'{"id": 1, "id": 2, "prompt": "x"}', "the key 'id' twice"),
        (b'["x"]', "expected an object, got ['x']"),
        (b'{"prompt": "x", "id": [1]}', "expected id as text or an integer, got [1]"),
        (b'{"prompt": "x", "id": true}', "expected id as text or an integer, got True"),
        (b'{"prompt": "  "}', "expected the keys messages, turns"),
        (b'{"turns": [""]}', "expected the keys messages, turns"),
        (b'{"messages": []}', "messages: expected a list"),
        (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}', f"expected at most {MAX_LINE_BYTES} bytes"),
        (request({"messages": USER, "frobnicate": 1}), "got 'frobnicate'"),
        (request({"messages": USER, "stream": True}), "stream: expected a field that is supported here, got True"),
        (request({"messages": USER, "tools": [{"type": "function"}]}), "tools: expected"),
        (request({"messages": USER, "response_format": {"type": "json_object"}}), "response_format: expected"),
        (request({"messages": USER, "temperature": -1}), "temperature: expected a number from 0 to 100, got -1"),
        (request({"messages": USER, "max_tokens": 0}), "max_tokens: expected an integer from 1"),
        (request({"messages": USER, "max_tokens": 1, "max_new_tokens": 2}), "max_tokens or max_new_tokens, got both"),
        (request({"messages": USER, "n": 0}), "line 3: n: expected an integer from 1"),
        (request({"messages": USER, "stop": [""]}), "stop: expected texts of at least one character"),
        (request({"messages": USER, "logit_bias": {"the": 1}}), "logit_bias: expected token ids, got 'the'"),
        (request({"messages": USER, "logprobs": 3}), "logprobs: expected true or false, got 3"),
        (request({"messages": USER, "top_logprobs": 3}), "top_logprobs: expected it beside logprobs true"),
        (request({"messages": USER, "logprobs": True, "top_logprobs": 21}), "top_logprobs: expected an integer"),
        (request({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "text parts, got"),
        (request({"messages": "Hello"}), "messages: expected a list"),
        (request({"messages": [{"content": "x"}]}), "give it a role"),
        (request({"prompt": "x"}), "expected messages in the body"),
        (request({"prompt": ["x", "y"]}, "/v1/completions"), "prompt: expected one text or list of token ids"),
        (request({"messages": USER, "chat_template_kwargs": "x"}), "chat_template_kwargs: expected an object, beside"),
        (request({"prompt": "x", "chat_template_kwargs": {}}, "/v1/completions"), "chat_template_kwargs: expected"),
        (request({"input": "x"}, "/v1/embeddings"), "expected the url /v1/chat/completions or /v1/completions"),
        (request([]), "expected body as an object"),
        (request({"messages": USER}, method="GET"), "expected the method POST"),
        (request({"messages": USER}, custom_id=5), "expected custom_id as text, got 5"),
        (request({"messages": USER}, priority=5), "got 'priority'"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {}}', "got none called method"),
    ],
)
def test_wrong_lines_are_one_line(data: bytes, message: str) -> None:
    error = read_line(3, data, False).error
    assert error is not None
    assert message in str(error)
    assert str(error).startswith("line 3: ")
    assert "\n" not in str(error)
    assert len(str(error)) < 700


def test_a_wrong_body_keeps_the_lines_id() -> None:
    line = read_line(3, request({"messages": USER, "temperature": -1}), False)
    assert (line.id, line.is_openai) == ("a", True)
    assert read_line(3, b"{", True).is_openai, "what can't be read looks like the rest of its file"
    assert not read_line(3, b"{", False).is_openai


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_a_file_line_by_line(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b", "id": "x"}\n{"prompt"\n{"prompt": "c"}'
    path = write(tmp_path / "in.jsonl", data)
    with open_input(path) as source:
        assert (source.count, source.is_openai) == (4, False)
        with Path(path).open("ab") as more:
            more.write(b'\n{"prompt": "appended"}\n')
        lines = list(source.lines())
    assert [(line.number, line.id, line.asked) for line in lines] == [
        (1, 1, "a"),
        (4, "x", "b"),
        (5, None, ""),
        (6, 6, "c"),
    ]
    assert [line.number for line in lines if line.error] == [5]


def test_a_broken_line_looks_like_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", b"{\n" + request({"messages": USER}) + b"\n")
    with open_input(path) as source:
        assert all(line.is_openai for line in source.lines())


def test_a_line_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    data = b'{"prompt": "' + b"x" * (3 * MAX_LINE_BYTES) + b'"}\n{"prompt": "b"}\n'
    with open_input(write(tmp_path / "in.jsonl", data)) as source:
        lines = list(source.lines())
    assert [(line.number, line.error is None) for line in lines] == [(1, False), (2, True)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n{"prompt": "c", "id": 1}', "got 1 in lines 1 and 3"),
        (b'{"prompt": "a", "id": 2}\n{"prompt": "b"}', "got 2 in lines 1 and 2"),
        (request({"messages": USER}) + b"\n" + request({"messages": USER}), 'got "a" in lines 1 and 2'),
        (b"", "got an empty file"),
        (b"\n \n", "got an empty file"),
        (b"prompt\nanswer\n", "got none that can be read: line 1: expected one strict JSON document"),
    ],
)
def test_a_file_that_is_refused_whole(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "in.jsonl", data)
    with pytest.raises(UserError, match="^" + path) as raised:
        open_input(path)
    assert message in str(raised.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nowhere", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=message):
            open_input(str(path))


def test_a_pipe_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read, write_end = os.pipe()
    os.write(write_end, b'{"prompt": "a"}\n{"prompt": "b"}\n')
    os.close(write_end)
    with open(read, "rb") as pipe:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        with open_input("-") as source:
            assert [line.asked for line in source.lines()] == ["a", "b"] == [line.asked for line in source.lines()]


def test_a_long_file_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for i in range(3000):
            file.write(json.dumps({"prompt": f"{i} " + "x" * 5000}) + "\n")
    tracemalloc.start()
    with open_input(str(path)) as source:
        count = sum(1 for _ in source.lines())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < 3e6 < path.stat().st_size / 4
