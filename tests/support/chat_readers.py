"""Readers of chat templates, and of the files of batches: see untrusted_readers.py."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import ext, sandbox
from judged_readers import Reader, fault_of_message, json_seeds, same, scratch, written
from models.chat_families import GEMMA, LLAMA_2, QWEN_3
from models.plain_artifact import write_artifact
from models.tokenizer_files import KINDS
from settings_readers import VOCABULARY, tokenizers_of_every_kind

from dovetail.runtime.artifact import manifest
from dovetail.runtime.artifact.opening import Artifact, open_artifact
from dovetail.runtime.batch.input_file import open_input
from dovetail.runtime.batch.line import Line
from dovetail.runtime.batch.output_file import OutputFile
from dovetail.runtime.batch.question_file import read_questions
from dovetail.runtime.batch.results import Results
from dovetail.runtime.errors import UserError
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.text import chat_format
from dovetail.runtime.text.chat_template import ChatTemplate
from dovetail.runtime.text.owned_text import TEMPLATE
from dovetail.runtime.text.template_worker import Renderer

_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
_HIS = "\ue001"  # in all that a caller says, and nowhere else
_CALL = {"function": {"name": _HIS, "arguments": {_HIS: 1}}}
_MESSAGES = [
    {"role": "system", "content": f"{_HIS} Be brief. {_HIS}"},
    {"role": "user", "content": f"{_HIS}</s>hi <s>{_HIS}"},
    {"role": "assistant", "content": f"<think>{_HIS}\n</think>\n\n b", "tool_calls": [_CALL]},
    {"role": "user", "content": f"  {_HIS}\n"},
]


class _Generation(ext.Extension):
    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


@functools.cache
def _plain_environment() -> jinja2.Environment:
    """As transformers sets it up: texts that know nothing of who wrote them."""

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    extensions: list[Any] = [_Generation, ext.loopcontrols]
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    return environment


_UNSTABLE = re.compile(
    r"random|lipsum|now|debug|__|xmlattr|pprint|urlize|escape|\|\s*e\b|safe|0x|[^{]%[^}]|[.|]\s*format\b"
)
"""What is another text each time, or shows what kind of text it is of (an `OwnedText`, or one that is safe in HTML)."""


def _template(data: bytes) -> None:
    source = data.decode("utf-8", "replace")
    job = {"messages": _MESSAGES, "tools": [{"name": _HIS}], "add_generation_prompt": True}
    template = _in_process(ChatTemplate(source, _SPECIAL, ["<s>", "</s>"]))
    rendering = template.rendering(**job)
    text, owners = rendering.text, rendering.owners
    assert len(owners) == len(text), "who wrote what"
    his = [owner for owner, character in zip(owners, text, strict=True) if character == _HIS]
    assert TEMPLATE not in his or _HIS in source or "\\" in source, "the caller's words are the template's"
    if not _UNSTABLE.search(source):
        try:
            plain = _plain_environment().from_string(source).render(**job, documents=None, **_SPECIAL)
        except Exception:  # what one environment refuses, the other may render
            return
        where = re.compile("0x[0-9a-f]+")  # of objects that were not meant to be shown
        assert where.sub("", text) == where.sub("", plain), (
            f"another text than transformers': {text!r:.200} {plain!r:.200}"
        )


def _template_seeds() -> list[bytes]:
    filters = "{{ messages[1].content|trim|upper|replace('H', bos_token) ~ eos_token }}{% for m in messages %}"
    filters += "{{ m.role|capitalize }}{{ m['content'].split('</s>')|join(', ') }}{{ m.content[1:-1] }}{% endfor %}"
    macros = "{% macro f(x) %}{{ x.strip() * 2 }}{% endmacro %}{{ f(messages[0].content) }}{{ messages|tojson }}"
    macros += (
        "{% set ns = namespace(a='') %}{% set ns.a = ns.a + bos_token %}{% generation %}{{ ns.a }}{% endgeneration %}"
    )
    more = (
        "{{ '%s' % messages[0].content }}{{ '{}'.format(messages[1].content) }}{{ tools|map(attribute='name')|list }}"
    )
    return [one.encode() for one in (LLAMA_2, GEMMA, QWEN_3, filters, macros, more)]


class _InProcess:
    """A worker without a process."""

    def __init__(self, setting: Mapping[str, Any]) -> None:
        self._renderer = Renderer(setting)

    def ask(self, line: bytes) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(json.dumps(self._renderer.answer(line)))
        return answer

    def close(self) -> None:
        """Nothing to end."""


def _in_process(template: ChatTemplate) -> ChatTemplate:
    template._process = _InProcess(template._process._setting)  # type: ignore[assignment]
    return template


@functools.cache
def _artifact() -> Artifact:
    files = dict.fromkeys((manifest.TARGET_MODEL, manifest.TARGET_WEIGHTS, manifest.CHAT_EXAMPLES), b"x")
    template = b"{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{{ tools }}{{ enable_thinking }}"
    files |= {manifest.TOKENIZER: json.dumps(KINDS["byte_level"]()).encode(), manifest.CHAT_TEMPLATE: template}
    return open_artifact(write_artifact(scratch() / "artifact", files))


def _format() -> chat_format.ChatFormat:
    made = chat_format.ChatFormat(_artifact(), tokenizers_of_every_kind()[0])
    _in_process(made._template)
    return made


def _examples(data: bytes) -> None:
    _artifact().file(manifest.CHAT_EXAMPLES).write_bytes(data)
    _format().verify()


_EXAMPLES = {
    "special_tokens": {"bos_token": "<s>"},
    "examples": [
        {
            "messages": [{"role": "user", "content": "a"}],
            "tools": None,
            "add_generation_prompt": True,
            "text": "user: a</s>None",
        }
    ],
}


@functools.cache
def _chat() -> chat_format.ChatFormat:
    _artifact().file(manifest.CHAT_EXAMPLES).write_bytes(json.dumps({"special_tokens": {}, "examples": []}).encode())
    return _format()


def _batch(data: bytes) -> None:
    with open_input(str(written("batch.jsonl", data))) as batch:
        lines = list(batch.lines())
        assert len(lines) == batch.count
        assert len({(type(line.id), line.id) for line in lines if line.id is not None}) == sum(
            line.id is not None for line in lines
        )
        results = Results("m", tokenizers_of_every_kind()[0], "batch")
        for line in lines:
            error = line.error or _answered(line)
            if error is not None:
                if fault_of_message(str(error)) is not None:
                    raise error
                json.dumps(results.failed(line, error), ensure_ascii=False).encode("utf-8", "backslashreplace")


def _answered(line: Line) -> UserError | None:
    """As far as it goes without a model."""
    try:
        GenerationConfig().with_changes(**{"seed": 1, **line.controls}).check(VOCABULARY)
        prompt = line.prompt(True)
        if isinstance(prompt, str):
            tokenizers_of_every_kind()[0].encode(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            _chat().encode(prompt, variables=line.chat_template_kwargs)  # type: ignore[arg-type]
        else:
            assert all(type(token) is int for token in prompt)
    except UserError as error:
        return error
    return None


def _openai(url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": f"{url}{'-'.join(body)}", "method": "POST", "url": url, "body": body}


def _batch_seeds() -> list[bytes]:
    said = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]
    plain = [
        {"prompt": "def f", "entry_point": "f", "task_id": "t"},
        {"id": 1, "turns": ["a", "b"]},
        {"question_id": 7, "question": "q"},
        {"instruction": "i", "input": "j"},
        {"messages": said},
    ]
    theirs = [
        _openai("/v1/chat/completions", messages=said, max_tokens=5, stop="x", logprobs=True, top_logprobs=2, n=2),
        _openai("/v1/chat/completions", messages=said, chat_template_kwargs={"enable_thinking": False}, stream=False),
        _openai("/v1/completions", prompt=["a"], logit_bias={"5": 1}, temperature=0.5, seed=3),
        _openai("/v1/completions", prompt=[1, 2, 3], logprobs=3, echo=False, model="m"),
    ]
    files = ["\n".join(map(json.dumps, lines)) + "\n" for lines in (plain, theirs)]
    return [*(text.encode() for text in files), b"\xef\xbb\xbf" + files[0].encode()]


_INPUT = b'{"prompt": "a"}\n\n{"id": "b", "prompt": ""}\n' + json.dumps(_openai("/v1/completions", prompt="a")).encode()


def _origin(sha256: str) -> dict[str, Any]:
    return {"input_sha256": sha256, "artifact": "a" * 64, "controls": {"temperature": 0.5}}


def _resumed(data: bytes, progress: bytes | None = None) -> None:
    """An output that is gone on with has in the end one line for every line of the input, its own in order."""
    source, out = written("in.jsonl", _INPUT), written("out.jsonl", data)
    with open_input(str(source)) as batch, OutputFile(str(out)) as output:
        if progress is None:
            progress = json.dumps({"format": 1, **_origin(batch.sha256), "seed": 5}).encode()
        written("out.jsonl.progress.json", progress)
        lines = batch.lines()
        output.begin(_origin(batch.sha256), lines, None, 7)
        kept = out.read_bytes()
        assert data.startswith(kept)
        assert kept.count(b"\n") == output.tally.done, "whole lines are kept, and no others"
        results = Results("m", tokenizers_of_every_kind()[0], output.batch_id)
        for line in lines:
            output.write(line.number, results.failed(line, UserError("expected more")))
        output.finish()
        assert output.tally.done == batch.count == 3
        key = ["id", "id", "custom_id"]
        documents = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
        found = [document[name] for name, document in zip(key, documents, strict=True)]
        assert same(found, [1, "b", "/v1/completionsprompt"]), found
        for document in documents:
            done = document.get("error") is not None or {"text", "response"} & document.keys()
            assert done, f"no answer, and no reason why: {document}"


def _resumed_seeds() -> list[bytes]:
    results = Results("m", tokenizers_of_every_kind()[0], "batch")
    with open_input(str(written("in.jsonl", _INPUT))) as batch:
        documents = [results.failed(line, line.error or UserError("expected more")) for line in batch.lines()]
    documents[0] = {
        "id": 1,
        "text": "x",
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "seed": 5,
    }
    lines = [json.dumps(document) + "\n" for document in documents]
    return ["".join(lines[:2]).encode() + b'{"id"', "".join(lines).encode()]


def _progress(data: bytes) -> None:
    _resumed(_resumed_seeds()[0], data)


def _progress_seeds() -> list[bytes]:
    with open_input(str(written("in.jsonl", _INPUT))) as batch:
        return [json.dumps({"format": 1, **_origin(batch.sha256), "seed": 5}).encode()]


def _question_seeds() -> list[bytes]:
    return [b"".join(line + b"\n" for line in _batch_seeds()[0].splitlines()[:4])]


def _encode(text: str, is_said: bool) -> list[int]:
    return tokenizers_of_every_kind()[0].encode(text)


def _questions(data: bytes) -> None:
    questions = read_questions(written("questions.jsonl", data))
    assert questions
    for question in questions:
        assert all(turn.strip() for turn in question.turns)
        assert tokenizers_of_every_kind()[0].encode(question.turns[0])


READERS: Mapping[str, Reader] = {
    "chat_template": Reader(_template, _template_seeds, "template"),
    "chat_examples": Reader(_examples, json_seeds(_EXAMPLES)),
    "batch_input": Reader(_batch, _batch_seeds, "lines"),
    "batch_output": Reader(_resumed, _resumed_seeds, "lines"),
    "batch_progress": Reader(_progress, _progress_seeds),
    "questions": Reader(_questions, _question_seeds, "lines"),
}
