"""Messages to the prompt text that a model was trained on: the artifact's jinja2 template, rendered in a process of
its own.

A template is untrusted code. jinja2's sandbox keeps it from attributes and from changing its arguments, but not from
looping or growing without end; so it runs in a worker process with bounded time, memory and output. The worker lives
as long as its `ChatTemplate` and renders one prompt per line.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text.template_worker import MAX_MEMORY_BYTES

TIMEOUT_S = 10.0
MAX_TEXT_BYTES = 16 << 20

Message = Mapping[str, Any]


class ChatTemplate:
    """One template. `render` may be called from several threads; they take turns."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: what the template may name, such as `bos_token` and `eos_token`."""
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text. Raises `UserError` for messages the template refuses, `ArtifactError` for a template that
        runs too long, grows too big, or reaches for what it must not."""
        check_messages(messages)
        job = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            line = json.dumps(job).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise UserError(
                f"messages: expected what JSON can hold, got {error}; pass texts, numbers and lists"
            ) from None
        with self._lock:
            answer = self._ask(line)
        if "text" in answer:
            return str(answer["text"])
        if answer["kind"] == "refused":
            raise UserError(f"messages: refused by the chat template: {answer['error']:.300}")
        raise ArtifactError(f"chat template: expected a prompt, got {answer['error']:.300}; pass another chat_template")

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _ask(self, line: bytes) -> dict[str, Any]:
        if self._worker is not None and self._worker.poll() is not None:  # somebody killed it
            self.close()
        worker = self._worker or self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        answer = b""
        with contextlib.suppress(BrokenPipeError), selectors.DefaultSelector() as selector:
            worker.stdin.write(line)
            worker.stdin.flush()
            selector.register(worker.stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n") and len(answer) <= MAX_TEXT_BYTES:
                if not selector.select(TIMEOUT_S):
                    self.close()
                    return {"kind": "failed", "error": f"nothing within {TIMEOUT_S:g} s"}
                piece = worker.stdout.read1(1 << 20)  # type: ignore[attr-defined]  # a buffered reader
                if not piece:
                    break
                answer += piece
        if not answer.endswith(b"\n"):
            self.close()
            return {
                "kind": "failed",
                "error": f"no text below {MAX_TEXT_BYTES} bytes and {MAX_MEMORY_BYTES} of memory",
            }
        document: dict[str, Any] = json.loads(answer)
        return document

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder that the user stands in must not provide modules. A session of its own: Ctrl-C is not for it.
        command = [sys.executable, "-P", "-m", "dovetail.runtime.text.template_worker"]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, start_new_session=True)
        assert self._worker.stdin is not None
        setting = {"source": self._source, "special_tokens": self._special_tokens}
        self._worker.stdin.write(json.dumps(setting).encode() + b"\n")
        return self._worker


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
