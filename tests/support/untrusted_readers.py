"""Every reader of bytes that nobody vouches for, as a function of bytes, with what must hold of what it takes.

A reader returns for bytes that it takes, and raises `UserError` for others; anything else is a fault. `complaint`
judges one input: tests/laws/test_corpus.py does it for kept ones, tests/tools/fuzz_readers.py for as many as there is
time for.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from chat_families import GEMMA, LLAMA_2, QWEN_3
from jinja2 import ext, sandbox
from plain_artifact import write_artifact
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from tiny_gguf import write_gguf
from tokenizer_files import KINDS, TEXTS

from dovetail.calibration.bench.workload import file_prompts
from dovetail.export.draft import config as draft_config
from dovetail.export.draft.files import draft_source
from dovetail.export.draft.published import DraftedTarget, PublishedDraft
from dovetail.export.sources import settings
from dovetail.export.sources.base import Source
from dovetail.export.sources.checkpoint import weight_files
from dovetail.export.sources.finding import find_source
from dovetail.export.sources.llama_shapes import read_shape
from dovetail.export.sources.safetensors_file import read_safetensors
from dovetail.export.target.native.families import is_native, read_decoder
from dovetail.export.target.native.tensor_names import check_tensors, tensor_shapes
from dovetail.runtime.artifact import manifest, strict_json
from dovetail.runtime.artifact.opening import Artifact, open_artifact
from dovetail.runtime.batch.input_file import open_input
from dovetail.runtime.batch.line import Line
from dovetail.runtime.batch.output_file import OutputFile
from dovetail.runtime.batch.results import Results
from dovetail.runtime.commands import options
from dovetail.runtime.commands.generate import _prompt
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.machine import Machine
from dovetail.runtime.policies import host_profile
from dovetail.runtime.policies.chances import Chances
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.sampling.config import CONTROLS, GenerationConfig, read_generation_config
from dovetail.runtime.targets import row_check
from dovetail.runtime.text import chat_format
from dovetail.runtime.text.chat_template import ChatTemplate
from dovetail.runtime.text.owned_text import TEMPLATE
from dovetail.runtime.text.template_worker import Renderer
from dovetail.runtime.text.tokenizer import Tokenizer, read_native
from dovetail.runtime.trees.shape import TreeShape

SECONDS = 2.0  # of the processor: what an input of a few kilobytes may take
_VOCABULARY = 1000
_MAX_MESSAGE = 1500
_LONG_TEXT = 1500


@dataclasses.dataclass(frozen=True, slots=True)
class Reader:
    """`read`: see above. `seeds`: what it takes, or nearly. `kind`: json, lines (of JSON), header (of
    safetensors), template, text or bytes, which says how an input is changed."""

    read: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    kind: str = "json"


def complaint(reader: Reader, data: bytes) -> tuple[str, str] | None:
    """None for bytes that are taken or refused as they should be; else (where and what, all of it)."""
    begin = time.process_time()
    refusal = None
    try:
        with np.errstate(all="ignore"):  # numbers may be any
            reader.read(data)
    except UserError as error:
        refusal = str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a native library is no Exception
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dovetail" in frame.filename]
        last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno} {last.name}"
        return what, "".join(traceback.format_exception(error))[-4000:]
    seconds = time.process_time() - begin
    if seconds > SECONDS:
        return "slow", f"{seconds:.1f} s"
    return None if refusal is None else _fault_of_message(refusal)


def _fault_of_message(text: str) -> tuple[str, str] | None:
    """An error says in one line of printable text what was expected and what to do."""
    shape = re.sub(r"[^a-z ]+", " ", text)[:50]
    if "\n" in text or "\r" in text:
        return f"a message of several lines: {shape}", text
    if not text.isprintable():
        return f"a message that does not print: {shape}", repr(text)
    if len(text) > _MAX_MESSAGE:
        return f"a long message: {shape}", text[:4000]
    if not re.search(r"expected|!=|refused by the chat template", text) or not re.search(r"; |: refused", text):
        return f"a message without a remedy: {shape}", text
    return None


# Where a reader wants a path. In memory, and the same name again and again.
@functools.cache
def _folder() -> Path:
    shared = Path("/dev/shm")
    holder = tempfile.TemporaryDirectory(prefix="dovetail-readers-", dir=shared if shared.is_dir() else None)
    _kept.append(holder)
    return Path(holder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _also(read: Callable[[], object]) -> None:
    """What may be refused without the whole being refused: only its message is judged."""
    try:
        read()
    except UserError as error:
        if _fault_of_message(str(error)) is not None:
            raise


def _same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # -0.0, and 1 beside True


def _json_seeds(*documents: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(document).encode() for document in documents]


# JSON ---------------------------------------------------------------------------------------------------------------


def _strict_json(data: bytes) -> None:
    document = strict_json.parse(data, "file", 1 << 16)
    assert _same(document, json.loads(data.decode()))
    assert len(strict_json.shown(document)) <= 80
    again = json.dumps(document).encode()
    assert _same(strict_json.parse(again, "file", 1 << 20), document)


def _manifest_seeds() -> list[bytes]:
    files = {name: manifest.FileEntry(5, "a" * 64) for name in (manifest.TARGET_MODEL, manifest.TARGET_WEIGHTS)}
    files |= {name: manifest.FileEntry(5, "0" * 64) for name in (manifest.TOKENIZER, manifest.DRAFT_MODEL)}
    target = manifest.TargetInfo("llama", 64, 2, 1000, 2048, 1000, "int8")
    draft = manifest.DraftInfo("dgf", 64, 1000, 2, 2, 16, 10, 1000, "float16")
    checks, tree = manifest.ExportChecks(100, 1e-3, 0.99, 0.97), TreeShape(12, 6, 4)
    whole = manifest.Manifest(manifest.FORMAT_VERSION, "m", target, draft, tree, checks, {"openvino": "1"}, files)
    windowed = dataclasses.replace(target, sliding_window=5, weight_forms={"Q4_1": 3}, rope_border=100)
    alone = {name: entry for name, entry in files.items() if name != manifest.DRAFT_MODEL}
    second = dataclasses.replace(whole, target=windowed, draft=None, files=alone)
    return [manifest.dumps(one).encode() for one in (whole, second)]


def _manifest(data: bytes) -> None:
    made = manifest.loads(data)
    assert manifest.loads(manifest.dumps(made)) == made
    for line in (made.checks.target_summary(), made.checks.warning() or "", made.name, made.target.architecture):
        assert line.isprintable(), line


_MACHINE = Machine("cpu", 2, 1, "none", {"numpy": "2"})
_ENGINES = host_profile.Engines("cpu", "fast", "confirmed", 2, 2)


def _profile_seeds() -> list[bytes]:
    table = ((1.0, 1.5), (1.1, 1.6))
    costs = Costs((64, 256), (1, 2), (1, 4), (1.0, 1.1), table, (1.0, 1.0), table, (0.2, 0.3), 0.1, 0.05, 0.0)
    shared = dataclasses.replace(costs, shared_texts=(2, 4), shared_plain=(1.5, 2.5), switch_ms=0.5)
    chances = Chances((0.9, 0.5, 0.1), ((0.6, 0.2), (0.5, 0.2)))
    choices = tuple(
        host_profile.Choice(t, kind, TreeShape(8, 3, 2), chances, 1.5, 150.0, 148.0, 90.0, None, 0.4)
        for t, kind in ((0.0, "adaptive"), (1.0, "fixed"))
    )
    made = host_profile.HostProfile(5, "a" * 64, _MACHINE, _ENGINES, "2026-01-31", 0.02, costs, choices)
    return [host_profile.dumps(dataclasses.replace(made, costs=one)).encode() for one in (costs, shared)]


def _profile(data: bytes) -> None:
    made = host_profile.loads(data)
    assert host_profile.loads(host_profile.dumps(made).encode()) == made
    assert made.summary.isprintable(), made.summary
    for temperature in (0.0, 0.7):
        policy = made.choice(temperature).policy
        assert math.isfinite(policy.gain if hasattr(policy, "gain") else 0.0)
    for context in (0, 100, 1 << 20):
        prices = made.costs.at(context)
        costs = [prices.pass_ms(rows, texts) for rows in (1, 3, 200) for texts in (1, 8)]
        costs += [prices.plain_ms(9), prices.level_ms(40), prices.first_ms(3), prices.row_ms(7)]
        assert all(map(math.isfinite, costs)), costs
    made.check("a" * 64, _MACHINE, _ENGINES)


def _rows(data: bytes) -> None:
    record = row_check._read(_file("rows.json", data))
    if record is None:
        raise UserError("expected a record; it is made again")
    assert record.check.summary.isprintable(), record
    assert record.how.isprintable(), record


def _rows_seeds() -> list[bytes]:
    checks = row_check.RowCheck(30, (), 0.0), row_check.RowCheck(30, ("a branch",), 0.5)
    records = [row_check.Record("a" * 64, "m", "fast", 2, check) for check in checks]
    return [json.dumps(dataclasses.asdict(record)).encode() for record in records]


# Tokenizers and prompts ---------------------------------------------------------------------------------------------


def _tokenizer_seeds() -> list[bytes]:
    seeds = []
    for kind in KINDS.values():
        document = kind()
        model = document["model"]
        if model["type"] == "BPE" and not model["byte_fallback"]:  # fewer bytes, the same fields
            keep = {*list(model["vocab"])[:60], "th", "he"}
            model["vocab"] = {token: i for token, i in model["vocab"].items() if token in keep}
            model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= keep]
            document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in keep]
        elif model["type"] == "BPE":
            model["vocab"] = {token: i for token, i in model["vocab"].items() if not re.match("<0x[1-9]", token)}
        else:
            model["vocab"] = [entry for entry in model["vocab"] if not re.match("<0x[4-9A-F]", entry[0])]
            document["added_tokens"] = []
            document["post_processor"] = None
        seeds.append(json.dumps(document).encode())
    return seeds


def _tokenizer(data: bytes) -> None:
    document = strict_json.parse(data, manifest.TOKENIZER, 1 << 20)
    native = read_native(document)
    _use(Tokenizer(document, native, GenerationConfig(), 1 << 25, 1 << 18), TEXTS)


def _use(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(0 <= token < 1 << 25 for token in ids)
        assert len(ids) < 80 * len(text.encode()) + 200, "a text that grows"
        stream = tokenizer.stream()
        shown = "".join(stream.push([token]) for token in ids) + stream.finish()
        assert len(shown.encode("utf-8", "surrogatepass")) < 80 * 1024 * len(ids) + 80
        tokenizer.decode(ids)
    for token in (0, tokenizer.vocab_size - 1):
        tokenizer.token_text(token)


@functools.cache
def _tokenizers() -> list[Tokenizer]:
    documents = [kind() for kind in KINDS.values()]
    return [Tokenizer(one, read_native(one), GenerationConfig(), 1 << 25, 1 << 18) for one in documents]


def _prompt_file(data: bytes) -> None:
    text = _prompt(None, str(_file("prompt", data)))
    for tokenizer in _tokenizers():
        _use(tokenizer, [text])
        controls = set(tokenizer._encoder._control)
        assert not controls & {*tokenizer.encode(text, add_special_tokens=False)}, "a control token was typed"
        tokenizer.encode(text, parse_special=True)


def _prompt_seeds() -> list[bytes]:
    return [*(text.encode() for text in TEXTS), b"<s>a</s> <|im_start|>\r\n", "\ufdd0\u2581 a\u0301".encode()]


def _generation(data: bytes) -> None:
    config = read_generation_config(strict_json.parse(data, "generation_config.json", 1 << 20), _VOCABULARY)
    config.check(_VOCABULARY)
    assert max(config.eos_token_id, default=0) < _VOCABULARY
    assert all(math.isfinite(getattr(config, name)) for name in ("temperature", "top_p", "repetition_penalty"))


_GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "eos_token_id": [1, 2],
    "bad_words_ids": [[1, 2], [3]],
    "suppress_tokens": [4],
    "stop_strings": ["x"],
    "max_length": 100,
    "min_new_tokens": 2,
}


def _config_flag(data: bytes) -> None:
    document = options._read_config(str(_file("config.json", data)))
    GenerationConfig().with_changes(**{name: document[name] for name in CONTROLS if name in document})
    engine = {name: value for name, value in document.items() if name not in CONTROLS and name != "tree"}
    EngineConfig(**engine)
    if document.get("tree"):
        dataclasses.replace(TreeShape(12, 6, 4), **document["tree"])


_CONFIG_FLAG = {"temperature": 0.5, "logit_bias": {"5": -1.0}, "tree": {"nodes": 8}, "numerics": "exact", "ctx_size": 9}


# Chat templates -----------------------------------------------------------------------------------------------------

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
    return open_artifact(write_artifact(_folder() / "artifact", files))


def _format() -> chat_format.ChatFormat:
    made = chat_format.ChatFormat(_artifact(), _tokenizers()[0])
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


# Batches ------------------------------------------------------------------------------------------------------------


@functools.cache
def _chat() -> chat_format.ChatFormat:
    _artifact().file(manifest.CHAT_EXAMPLES).write_bytes(json.dumps({"special_tokens": {}, "examples": []}).encode())
    return _format()


def _batch(data: bytes) -> None:
    with open_input(str(_file("batch.jsonl", data))) as batch:
        lines = list(batch.lines())
        assert len(lines) == batch.count
        assert len({(type(line.id), line.id) for line in lines if line.id is not None}) == sum(
            line.id is not None for line in lines
        )
        results = Results("m", _tokenizers()[0], "batch")
        for line in lines:
            error = line.error or _answered(line)
            if error is not None:
                if _fault_of_message(str(error)) is not None:
                    raise error
                json.dumps(results.failed(line, error), ensure_ascii=False).encode("utf-8", "backslashreplace")


def _answered(line: Line) -> UserError | None:
    """As far as it goes without a model."""
    try:
        GenerationConfig().with_changes(**{"seed": 1, **line.controls}).check(_VOCABULARY)
        prompt = line.prompt(True)
        if isinstance(prompt, str):
            _tokenizers()[0].encode(prompt)
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
    source, out = _file("in.jsonl", _INPUT), _file("out.jsonl", data)
    with open_input(str(source)) as batch, OutputFile(str(out)) as output:
        if progress is None:
            progress = json.dumps({"format": 1, **_origin(batch.sha256), "seed": 5}).encode()
        _file("out.jsonl.progress.json", progress)
        lines = batch.lines()
        output.begin(_origin(batch.sha256), lines, None, 7)
        kept = out.read_bytes()
        assert data.startswith(kept)
        assert kept.count(b"\n") == output.tally.done, "whole lines are kept, and no others"
        results = Results("m", _tokenizers()[0], output.batch_id)
        for line in lines:
            output.write(line.number, results.failed(line, UserError("expected more")))
        output.finish()
        assert output.tally.done == batch.count == 3
        key = ["id", "id", "custom_id"]
        documents = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
        found = [document[name] for name, document in zip(key, documents, strict=True)]
        assert _same(found, [1, "b", "/v1/completionsprompt"]), found
        for document in documents:
            done = document.get("error") is not None or {"text", "response"} & document.keys()
            assert done, f"no answer, and no reason why: {document}"


def _resumed_seeds() -> list[bytes]:
    results = Results("m", _tokenizers()[0], "batch")
    with open_input(str(_file("in.jsonl", _INPUT))) as batch:
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
    with open_input(str(_file("in.jsonl", _INPUT))) as batch:
        return [json.dumps({"format": 1, **_origin(batch.sha256), "seed": 5}).encode()]


def _question_seeds() -> list[bytes]:
    return [b"".join(line + b"\n" for line in _batch_seeds()[0].splitlines()[:4])]


def _questions(data: bytes) -> None:
    prompts = file_prompts(_file("questions.jsonl", data), lambda text, _: _tokenizers()[0].encode(text), 3, 50)
    assert 0 < len(prompts) <= 3
    assert all(0 < len(prompt.ids) <= 50 for prompt in prompts)


# What an export reads -----------------------------------------------------------------------------------------------

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 6,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
_CONFIGS = (
    _LLAMA,
    _LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    _LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 16}},
    _LLAMA | {"model_type": "gemma3_text", "head_dim": 4, "sliding_window": 16, "layer_types": ["full_attention"],
              "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}},
    _LLAMA | {"model_type": "phi3", "partial_rotary_factor": 0.5, "original_max_position_embeddings": 32,
              "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    _LLAMA | {"model_type": "smollm3", "no_rope_layers": [1], "quantization_config": {"quant_method": "fp8"}},
)  # fmt: skip


@functools.cache
def _checkpoint() -> Path:
    folder = _folder() / "checkpoint"
    folder.mkdir()
    source = Source(folder, "checkpoint", _LLAMA, {}, "", {}, {}, {})
    weights = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(read_decoder(source)).items()}
    (folder / "model.safetensors").write_bytes(save_safetensors(weights))
    (folder / "tokenizer.json").write_bytes(_tokenizer_seeds()[0])
    (folder / "config.json").write_text(json.dumps(_LLAMA))
    return folder


def _checkpoint_config(data: bytes) -> None:
    (_checkpoint() / "config.json").write_bytes(data)
    source = find_source(_checkpoint())
    _also(lambda: read_shape(_checkpoint()))  # what another command reads of it
    if is_native(source):
        decoder = read_decoder(source)
        numbers = [decoder.attention_scale, decoder.embedding_scale, decoder.residual_scale, decoder.logits_divisor]
        assert all(map(math.isfinite, numbers)), numbers
        check_tensors(source, decoder)


def _checkpoint_settings(data: bytes) -> None:
    """The small files beside a checkpoint's config, all of the same bytes."""
    folder = _folder() / "settings"
    for name in ("tokenizer_config", "special_tokens_map", "generation_config", "tokenizer"):
        _file(f"settings/{name}.json", data)
    _also(lambda: json.dumps(settings.read_special_tokens(folder)))
    _also(lambda: json.dumps(settings.read_chat_templates(folder)))
    _also(lambda: json.dumps(settings.read_generation_config(folder, {"eos_token_id": 1})))
    _file("settings/model.safetensors.index.json", data)
    _also(lambda: weight_files(folder))
    settings.read_tokenizer(folder)


_SETTINGS = (
    {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"},
    {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}], "eos_token_id": 2},
)


def _settings_seeds() -> list[bytes]:
    return [*(json.dumps(one).encode() for one in _SETTINGS), _tokenizer_seeds()[0]]


def _draft_config(data: bytes) -> None:
    folder = _folder() / "draft"
    _file("draft/config.json", data)
    _file("draft/model.safetensors", b"")
    if "kind" in draft_source(folder).config:
        made = draft_config.read_config(folder)
        draft_config.check_fits(made, 6, 8)
        for field in dataclasses.fields(made):
            value = getattr(made, field.name)
            good = {
                "bool": (bool,), "str": (str,), "int": (int,), "float": (int, float), "int | None": (int, type(None)),
                "str | None": (str, type(None)),
            }.get(str(field.type), (tuple,))  # fmt: skip
            assert type(value) in good, f"{field.name} {value!r}"
        assert all(type(layer) is int for layer in made.feature_layers)
        return
    tensors = {"layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float32)}
    target = DraftedTarget(find_source(_whole_checkpoint()), *np.zeros((2, 6, 8), np.float32))
    made = PublishedDraft(draft_source(folder), tensors, target).config("eagle")
    assert all(map(math.isfinite, made.rope_frequencies))


def _whole_checkpoint() -> Path:
    (_checkpoint() / "config.json").write_text(json.dumps(_LLAMA))
    return _checkpoint()


_DRAFT = {
    "kind": "dgf",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "vocab_size": 6,
    "rms_norm_eps": 1e-5,
    "rope_frequencies": [1.0, 0.01],
    "head_size": 4,
    "feature_layers": [0, 1],
    "qk_norm": True,
    "vocabulary_sha256": None,
}


def _gguf(data: bytes) -> None:
    path = _file("model.gguf", data)
    source = find_source(path)
    for tensor in source.tensors.values():
        assert tensor.read().shape == tensor.shape
    read_decoder(source)
    document = json.loads(source.tokenizer)
    read_native(document)
    json.dumps(source.config, allow_nan=False)
    json.dumps(source.generation_config, allow_nan=False)


def _gguf_documents() -> Iterator[dict[str, Any]]:
    """Values, and shapes of tensors: a Llama of one layer, and a Gemma 3 of SentencePiece's tokens."""
    sizes = {
        "context_length": 64,
        "embedding_length": 8,
        "block_count": 1,
        "feed_forward_length": 8,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
        "attention.sliding_window": 16,
    }
    layer = {"attn_q": [8, 8], "attn_k": [4, 8], "attn_v": [4, 8], "attn_output": [8, 8], "ffn_gate": [8, 8]}
    layer |= {"ffn_up": [8, 8], "ffn_down": [8, 8], "attn_norm": [8], "ffn_norm": [8]}
    byte = [f"<0x{value:02X}>" for value in range(256)]
    for kind, ours in (("llama", "gpt2"), ("gemma3", "llama")):
        tokens = ["a", "b", "ab", "</s>"] if ours == "gpt2" else ["<unk>", "a", "b", "ab", *byte]
        values: dict[str, Any] = {"general.architecture": kind}
        values |= {f"{kind}.{name}": value for name, value in sizes.items()}
        values |= {"tokenizer.ggml.model": ours, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos_token_id": 1}
        values |= {"tokenizer.ggml.eos_token_id": 3, "tokenizer.chat_template": "{{ messages }}"}
        own = layer
        if ours == "gpt2":
            values |= {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"]}
            values["tokenizer.ggml.token_type"] = [1, 1, 1, 3]
        else:
            values["tokenizer.ggml.token_type"] = [2, 1, 1, 1, *[6] * 256]
            values["tokenizer.ggml.scores"] = [0.0, -1.0, -2.0, -3.0, *[0.0] * 256]
            own |= {"post_attention_norm": [8], "post_ffw_norm": [8], "attn_q_norm": [4], "attn_k_norm": [4]}
        shapes = {"token_embd": [len(tokens), 8], "output_norm": [8]} | {f"blk.0.{n}": own[n] for n in own}
        yield {"values": values, "shapes": shapes}


def _written_gguf(document: Any) -> bytes:
    tensors = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in document["shapes"].items()}
    return write_gguf(_folder() / "written.gguf", document["values"], tensors).read_bytes()


def _gguf_seeds() -> list[bytes]:
    return list(map(_written_gguf, _gguf_documents()))


def _gguf_metadata(data: bytes) -> None:
    """A GGUF file that is whole, and whatever its values say."""
    try:
        document = json.loads(data)
        assert all(type(size) is int for shape in document["shapes"].values() for size in shape)
        assert sum(math.prod(shape) for shape in document["shapes"].values()) < 1 << 16
        written = _written_gguf(document)
    except Exception:  # there is no such file, or a large one
        raise UserError("expected values that can be written; change them") from None
    _gguf(written)


def _gguf_metadata_seeds() -> list[bytes]:
    return [json.dumps(document).encode() for document in _gguf_documents()]


def _safetensors(data: bytes) -> None:
    stored = read_safetensors([_file("model.safetensors", data)])
    for tensor in stored.values():
        assert tensor.read().shape == tensor.shape
    try:
        theirs = load_safetensors(data)
    except (SafetensorError, KeyError, ValueError, AttributeError, TypeError):  # types that numpy lacks
        return
    for name, tensor in stored.items():
        if not tensor.kind.startswith("F8"):
            expected = theirs[name].astype(np.float32)
            assert np.array_equal(tensor.read(), expected, equal_nan=True), name


def _safetensors_seeds() -> list[bytes]:
    plain = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16), "c": np.ones((0, 2), np.int64)}
    header = {
        "w": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]},
        "w_scale_inv": {"dtype": "F32", "shape": [1, 1], "data_offsets": [8, 12]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    return [save_safetensors(plain), len(text).to_bytes(8, "little") + text + bytes(12)]


READERS: Mapping[str, Reader] = {
    "strict_json": Reader(_strict_json, _json_seeds({"a": [1, -2.5, "\u00e9", None, True], "b": {"c": {}}}, [])),
    "manifest": Reader(_manifest, _manifest_seeds),
    "profile": Reader(_profile, _profile_seeds),
    "rows": Reader(_rows, _rows_seeds),
    "tokenizer": Reader(_tokenizer, _tokenizer_seeds),
    "generation_config": Reader(_generation, _json_seeds(_GENERATION, {"do_sample": False, "top_p": 0})),
    "config_flag": Reader(_config_flag, _json_seeds(_CONFIG_FLAG)),
    "chat_template": Reader(_template, _template_seeds, "template"),
    "chat_examples": Reader(_examples, _json_seeds(_EXAMPLES)),
    "batch_input": Reader(_batch, _batch_seeds, "lines"),
    "batch_output": Reader(_resumed, _resumed_seeds, "lines"),
    "batch_progress": Reader(_progress, _progress_seeds),
    "questions": Reader(_questions, _question_seeds, "lines"),
    "prompt": Reader(_prompt_file, _prompt_seeds, "text"),
    "gguf_metadata": Reader(_gguf_metadata, _gguf_metadata_seeds),
    "gguf": Reader(_gguf, _gguf_seeds, "bytes"),
    "safetensors": Reader(_safetensors, _safetensors_seeds, "header"),
    "checkpoint_config": Reader(_checkpoint_config, _json_seeds(*_CONFIGS)),
    "checkpoint_settings": Reader(_checkpoint_settings, _settings_seeds),
    "draft_config": Reader(_draft_config, _json_seeds(_DRAFT, _LLAMA)),
}


def packed(data: bytes, was: str = "") -> str:
    """An input as a line of a corpus: text as it is, bytes and long texts compressed. `was`: what once went wrong."""
    entry = {"zlib": base64.b64encode(zlib.compress(data, 9)).decode()}
    with contextlib.suppress(UnicodeDecodeError):
        if len(data) < _LONG_TEXT:
            entry = {"text": data.decode("utf-8")}
    return json.dumps(entry | ({"was": was} if was else {}))


def unpacked(line: str) -> bytes:
    """The input in a line of a corpus."""
    entry = json.loads(line)
    return entry["text"].encode() if "text" in entry else zlib.decompress(base64.b64decode(entry["zlib"]))


def kept(corpus: Path) -> Iterator[bytes]:
    """The inputs that a corpus' file keeps."""
    if corpus.is_file():
        yield from map(unpacked, corpus.read_text(encoding="utf-8").splitlines())


os.environ.setdefault("OMP_WAIT_POLICY", "passive")
