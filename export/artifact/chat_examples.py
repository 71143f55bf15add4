"""Renderings of the chat template made at export: where an artifact is run, they must come out the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.export.artifact.chat_templates import template_place
from dovetail.export.sources.base import Source
from dovetail.runtime.artifact import manifest as manifests
from dovetail.runtime.errors import UserError
from dovetail.runtime.text.chat_template import ChatTemplate

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "A town."}},
            "required": ["place"],
        },
    },
}
_USER = {"role": "user", "content": "What is 2 + 2? <b>Réponse</b> & why\n"}
_ASSISTANT = {"role": "assistant", "content": " 4, because \"two\" and 'two' make four. "}
_SYSTEM = {"role": "system", "content": "You are terse."}
_JOBS: list[dict[str, Any]] = [
    {"messages": [_USER], "tools": None, "add_generation_prompt": True},
    {"messages": [_USER, _ASSISTANT], "tools": None, "add_generation_prompt": False},
    {"messages": [_SYSTEM, _USER, _ASSISTANT, _USER], "tools": None, "add_generation_prompt": True},
    {"messages": [_USER], "tools": [_TOOL], "add_generation_prompt": True},
]


def write_chat_examples(source: Source, folder: Path) -> None:
    """Write `chat_examples.json` beside the artifact's chat template: special tokens, and how the template is rendered
    here, which is as by transformers (tests/runtime/text hold that).

    A conversation that the template refuses (no system role, say) gives no example, and a template that shows today's
    date gives none at all.
    """
    examples = []
    for job in _JOBS:
        template = (folder / template_place(folder, job["tools"] is not None)).read_text(encoding="utf-8")
        if "strftime_now" in template:
            continue
        renderer = ChatTemplate(template, source.special_tokens)
        with contextlib.suppress(UserError), contextlib.closing(renderer):
            text = renderer.render(
                job["messages"], tools=job["tools"], add_generation_prompt=job["add_generation_prompt"]
            )
            examples.append({**job, "text": text})
    _write(folder, source.special_tokens, examples)


def _write(folder: Path, special_tokens: Mapping[str, str], examples: list[dict[str, Any]]) -> None:
    document = {"special_tokens": dict(special_tokens), "examples": examples}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    (folder / manifests.CHAT_EXAMPLES).write_text(text, encoding="utf-8")
