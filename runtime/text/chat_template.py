"""Messages to the prompt text that a model was trained on: the artifact's jinja2 template, rendered in a process of
its own.

A template is untrusted code. jinja2's sandbox keeps it from attributes and from changing its arguments, but not from
looping or growing without end; so it runs in a worker process with bounded time, memory and output. The worker lives
as long as its `ChatTemplate` and renders one prompt per line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dovetail.runtime.artifact.strict_json import printable
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text.template_process import TemplateProcess

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")


@dataclasses.dataclass(frozen=True, slots=True)
class Rendering:
    """A prompt's text, and for each of its characters who wrote it: `TEMPLATE`, `CALLER` or `ASSISTANT` of
    `owned_text.py`."""

    text: str
    owners: bytes

    def front(self, length: int) -> Rendering:
        """The first `length` characters."""
        return Rendering(self.text[:length], self.owners[:length])


class ChatTemplate:
    """One template. It may be rendered from several threads; they take turns."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], control_tokens: Iterable[str] = ()) -> None:
        """`special_tokens`: what the template may name, such as `bos_token` and `eos_token`. `control_tokens`: the
        texts that count as one token where the template writes them."""
        self.source = source
        named = list(special_tokens.values())
        self._process = TemplateProcess(
            {
                "source": source,
                "special_tokens": dict(special_tokens),
                "control_tokens": [token for token in control_tokens if token in source or token in named],
            }
        )
        self._lock = threading.Lock()

    def render(self, messages: Sequence[Message], **arguments: Any) -> str:
        """The text of `rendering`."""
        return self.rendering(messages, **arguments).text

    def rendering(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendering:
        """The prompt, and who wrote what of it. `variables` are what the template may name besides.

        Raises `UserError` for messages the template refuses, `ArtifactError` for a template that runs too long, grows
        too big, or reaches for what it must not.
        """
        check_messages(messages)
        variables = variables or {}
        for name in _OWN_VARIABLES:
            if name in variables:
                raise UserError(f"chat_template_kwargs: expected names beside {', '.join(_OWN_VARIABLES)}, got {name}")
        job = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            line = json.dumps(job | {"variables": variables}).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise UserError(
                f"messages: expected what JSON can hold, got {error}; pass texts, numbers and lists"
            ) from None
        with self._lock:
            answer = self._process.ask(line)
        if "text" in answer:
            return Rendering(answer["text"], b"".join(bytes([owner]) * length for owner, length in answer["owners"]))
        why = printable(" ".join(answer["error"].split()))[:300]
        if answer["kind"] == "refused":
            raise UserError(f"messages: refused by the chat template: {why}")
        raise ArtifactError(f"chat template: expected a prompt, got {why}; pass another chat_template")

    def close(self) -> None:
        """End the worker."""
        self._process.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def check_messages(messages: object) -> None:
    """Raise `UserError` unless this is a list of objects with a role and a content, as in OpenAI's and transformers'
    chats.
    """
    shape = 'a list of {"role": ..., "content": ...}'
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"messages: expected {shape}, got {messages!r:.80}; wrap the text in a message")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"messages: expected {shape}, got the entry {message!r:.80}; give it a role")
        if "content" not in message and "tool_calls" not in message:
            raise UserError(f"messages: expected {shape}, got an entry with {sorted(message)!r:.80}; give it a content")
