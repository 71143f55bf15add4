"""Chat templates as families of models have them, each with a tokenizer of its kind: for comparing with transformers.

Run as a program it prints the ids of every family's conversations, which must not depend on the process.
"""
# ruff: noqa: E501, RUF001  # the templates are as published

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.plain_artifact import write_artifact
from models.tokenizer_files import byte_fallback, byte_level, gemma_like
from tokenizers import AddedToken
from tokenizers import Tokenizer as NativeTokenizer

from dovetail.runtime.artifact import manifest
from dovetail.runtime.artifact.opening import Artifact, open_artifact
from dovetail.runtime.text.chat_format import ChatFormat
from dovetail.runtime.text.tokenizer import load_tokenizer

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] != 'assistant' %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"""
QWEN_3 = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "\\n</tools><|im_end|>\\n" }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}{%- if message.role == 'user' and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) and index > 0 %}{%- set ns.last = index %}{%- break %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}{%- set content = message.content %}{%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning_content %}{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}{{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}\\n</tool_call>' }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""  # but for the system message
DEEPSEEK = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
PHI_3 = """{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

BLANKS = ("\n\n", "\n\n\n", "  ", "   ", "    ", "\t\t")


def _metaspace_first() -> dict[str, Any]:
    """As Mistral's newer tokenizers: the first piece of a text alone gets a blank in front."""
    document = byte_fallback()
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    return document


@dataclasses.dataclass(frozen=True)
class Family:
    """A template and a tokenizer: a document and the tokens added to it; `special` and `plain` by that field,
    `stripping` ones swallow blanks behind them. `variables`: what else the template may be given."""

    template: str
    document: Callable[[], dict[str, Any]]
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    stripping: tuple[str, ...] = ()
    variables: tuple[dict[str, Any], ...] = ({},)

    def tokenizer_file(self) -> dict[str, Any]:
        native = NativeTokenizer.from_str(json.dumps(self.document()))
        native.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in self.special])
        native.add_special_tokens(
            [AddedToken(text, normalized=False, rstrip=True, lstrip="a" in text) for text in self.stripping]
        )
        native.add_tokens([AddedToken(text, normalized=False, special=False) for text in self.plain])
        document: dict[str, Any] = json.loads(native.to_str())
        return document

    @property
    def control_tokens(self) -> list[str]:
        return [
            *self.special,
            *self.stripping,
            *(text for text in self.plain if text.strip() and text not in ("<h1>", "õ")),
        ]


FAMILIES = {
    "chatml": Family(CHATML, byte_level, ("<|im_start|>", "<|im_end|>"), BLANKS),
    "llama 2": Family(LLAMA_2, byte_fallback),
    "llama 3": Family(
        LLAMA_3, byte_level, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    ),
    "gemma": Family(GEMMA, gemma_like, ("<start_of_turn>", "<end_of_turn>"), (*BLANKS, "<h1>")),
    "mistral": Family(MISTRAL, _metaspace_first, ("[INST]", "[/INST]")),
    "qwen 3": Family(
        QWEN_3,
        byte_level,
        ("<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        variables=({}, {"enable_thinking": False}, {"enable_thinking": True}),
    ),
    "deepseek": Family(
        DEEPSEEK, byte_level, ("<｜end▁of▁sentence｜>",), ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "õ")
    ),
    "phi 3": Family(PHI_3, byte_fallback, (), BLANKS, ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>")),
}

TEXTS = [
    "hi",
    "  two blanks, and a line end\n",
    "a\n\n\nb\n\n",
    "\tdef f(x):\n\t\treturn 'é' * x     # größer, 東京, 😀👩‍👩‍👧\n\n    õ <h1>",
    "</ <| |> [INS ▁ < think > \ufdd0 {{ messages }}",
    "à la 北京 ﷺ ",
]


def conversations(texts: list[str]) -> list[list[dict[str, Any]]]:
    """Of each text a question, a history, and one that an assistant has reasoned about."""
    found = []
    for text in texts:
        user, other = {"role": "user", "content": text}, {"role": "user", "content": "and?"}
        found += [
            [user],
            [user, {"role": "assistant", "content": text}, other],
            [user, {"role": "assistant", "content": f"<think>\n{text}\n</think>\n\n{text}"}, other],
            [{"role": "system", "content": text}, user],
        ]
    return found


def chat_artifact(family: Family, root: Path, **generation: Any) -> Artifact:
    """One that holds nothing but what reads and writes the family's conversations."""
    tokens = {"special_tokens": {"bos_token": "<s>", "eos_token": "</s>"}, "examples": []}
    files: Mapping[str, Any] = {
        manifest.TOKENIZER: json.dumps(family.tokenizer_file()),
        manifest.CHAT_TEMPLATE: family.template,
        manifest.CHAT_EXAMPLES: json.dumps(tokens),
    }
    data = {name: text.encode() for name, text in files.items()}
    data |= {manifest.TARGET_MODEL: b"", manifest.TARGET_WEIGHTS: b""}
    if generation:
        data[manifest.GENERATION_CONFIG] = json.dumps(generation).encode()
    return open_artifact(write_artifact(root, data))


def open_chat(family: Family, root: Path) -> ChatFormat:
    """The family's, from such an artifact."""
    artifact = chat_artifact(family, root)
    return ChatFormat(artifact, load_tokenizer(artifact))


def main() -> None:
    root = Path(sys.argv[1])
    for name, family in FAMILIES.items():
        chat = open_chat(family, root / name)
        for messages in conversations([*TEXTS, *family.control_tokens]):
            print(chat.encode(messages))
        chat.close()


if __name__ == "__main__":
    main()
