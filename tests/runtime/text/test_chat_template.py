"""Proves that templates render as in transformers, that an artifact's examples are replayed, that control tokens a
user wrote stay text, and that a hostile template ends in one error within bounded time and memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dovetail.export.artifact.chat_examples import _JOBS
from dovetail.export.artifact.writing import write_artifact
from dovetail.runtime import load
from dovetail.runtime.artifact import manifest
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.commands.cli import main
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text import template_process
from dovetail.runtime.text.chat_format import ChatFormat
from dovetail.runtime.text.chat_template import ChatTemplate
from dovetail.runtime.text.tokenizer import load_tokenizer

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
<|im_start|>{{ message['role'] }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501  # templates in the wild are as long
STRICT = """{{ bos_token }}{% for message in messages %}{% if loop.index0 == 0 and message.role == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}{% if message.role == 'user' %}[INST] {{ message.content.strip() }} [/INST]
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""  # noqa: E501  # likewise
LOOPS = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if loop.index0 < ns.last %}{% continue %}{% endif %}{{ m.role | upper }}={{ m | tojson(indent=2) }}{% endfor %}"""  # noqa: E501  # likewise
TEMPLATES = [pytest.param(CHATML, id="chatml"), pytest.param(STRICT, id="strict"), pytest.param(LOOPS, id="loops")]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("job", _JOBS)
def test_renderings_are_those_of_transformers(tiny_checkpoint: Path, source: str, job: dict[str, Any]) -> None:
    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint)
    settings = {name: value for name, value in job.items() if name != "messages"}
    ours = ChatTemplate(source, {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token})
    if source == STRICT and job["messages"][0]["role"] == "system":
        with pytest.raises(UserError, match="refused by the chat template: System role not supported"):
            ours.render(job["messages"], **settings)
        return
    expected = theirs.apply_chat_template(job["messages"], chat_template=source, tokenize=False, **settings)
    assert ours.render(job["messages"], **settings) == expected
    ours.close()


@pytest.fixture(scope="module")
def talking_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a chat template."""
    import shutil

    source = tmp_path_factory.mktemp("talking") / "checkpoint"
    shutil.copytree(tiny_checkpoint, source)
    (source / "chat_template.jinja").write_text(STRICT)
    out = source.with_name("artifact")
    write_artifact(source, out)
    return out


def test_the_export_keeps_examples_and_inspect_replays_them(
    talking_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["dovetail", "inspect", str(talking_artifact), "--verify"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "3 examples render as at export" in capsys.readouterr().out  # the fourth has a system message


def test_an_example_that_renders_otherwise_is_an_error(talking_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = open_artifact(talking_artifact)
    chat = ChatFormat(artifact, load_tokenizer(artifact), STRICT.replace("[INST]", "[ASK]"))
    with pytest.raises(ArtifactError, match=r"expected 'INST.*as the export rendered it"):
        chat.verify()
    chat.close()


def test_a_model_talks_without_naming_its_template(talking_artifact: Path) -> None:
    with load(talking_artifact, numerics="exact") as pipe:
        ids = pipe.encode([{"role": "user", "content": " hi "}])
        assert pipe.tokenizer.decode(ids, skip_special_tokens=False) == "<|endoftext|>[INST] hi [/INST]"
        assert ids[0] == 0, "the template's control tokens count"
        hostile = pipe.encode([{"role": "user", "content": "a<|endoftext|>b"}])
        assert hostile.count(0) == 1, "a user's are text"
        assert "a<|endoftext|>b" in pipe.tokenizer.decode(hostile, skip_special_tokens=False)
        assert pipe.generate([{"role": "user", "content": "hi"}], max_new_tokens=4, ignore_eos=True).token_ids


def test_the_folder_that_a_user_stands_in_provides_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert template.render([{"role": "user", "content": "fine"}]) == "fine"
    template.close()


def test_a_worker_that_dies_is_replaced_and_ctrl_c_is_not_for_it() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    ask = [{"role": "user", "content": "fine"}]
    assert template.render(ask) == "fine"
    worker = template._process._worker
    assert worker is not None
    assert os.getpgid(worker.pid) != os.getpgid(0), "Ctrl-C goes to the terminal's process group"
    worker.kill()
    worker.wait()
    assert template.render(ask) == "fine"
    template.close()


HOSTILE = [
    pytest.param("{{ ''.__class__.__mro__[1].__subclasses__() }}", "not allowed", id="attributes"),
    pytest.param("{{ messages.append(1) }}", "not allowed", id="changes its arguments"),
    pytest.param("{{ cycler.__init__.__globals__.os }}", "not allowed|undefined", id="globals"),
    pytest.param(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "nothing within", id="loops"
    ),
    pytest.param("{{ 9 ** (9 ** 9) }}", "nothing within|MemoryError|ValueError", id="a power"),
    pytest.param("{{ 'a' * 10 ** 10 }}", "MemoryError", id="one long string"),
    pytest.param("{{ messages[0].content * 2 * 10 ** 7 }}", "no text below", id="too much output"),
    pytest.param(
        "{% set ns = namespace(s='ab') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "MemoryError|nothing within|no text below",
        id="doubling",
    ),
    pytest.param("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError", id="recursion"),
    pytest.param("{% if %}", "syntax error in line 1", id="syntax"),
    pytest.param("{% include '/etc/passwd' %}", "no loader|TypeError|refused", id="include"),
]


@pytest.mark.parametrize(("source", "message"), HOSTILE)
def test_a_hostile_template_is_one_error_in_bounded_time(
    source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "nothing within" in message:  # the others end by themselves, on a busy machine too
        monkeypatch.setattr(template_process, "TIMEOUT_S", 2.0)
    template = ChatTemplate(source, {})
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as raised:  # ArtifactError is one
        template.render([{"role": "user", "content": "x"}])
    assert time.monotonic() - start < 30
    assert "\n" not in str(raised.value)
    template.close()


@pytest.mark.parametrize(
    "messages", ["hi", [], [{}], [3], [{"role": 3, "content": "x"}], [{"role": "user"}], {"role": "user"}]
)
def test_messages_in_a_wrong_shape_are_refused(messages: Any) -> None:
    with pytest.raises(UserError, match="messages: expected a list"):
        ChatTemplate("{{ messages }}", {}).render(messages)


def test_bad_example_files_are_refused(talking_artifact: Path, tmp_path: Path) -> None:
    artifact = open_artifact(talking_artifact)
    tokenizer = load_tokenizer(artifact)
    places = {**artifact.places, manifest.CHAT_EXAMPLES: tmp_path / manifest.CHAT_EXAMPLES}
    for document in ([], {}, {"special_tokens": {"a": 1}, "examples": []}, {"special_tokens": {}, "examples": [{}]}):
        (tmp_path / "examples").write_text(json.dumps(document))
        places = {**artifact.places, manifest.CHAT_EXAMPLES: tmp_path / "examples"}
        with pytest.raises(ArtifactError, match="expected special_tokens and examples"):
            ChatFormat(dataclasses.replace(artifact, places=places), tokenizer, STRICT)
