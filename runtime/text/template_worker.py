"""The process that renders a chat template in bounded memory: `template_process.py` starts it, sends it jobs, and ends
it when it takes too long.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.runtime.text.owned_text import ASSISTANT, CALLER, owned_by, owners_of

MAX_MEMORY_BYTES = 1 << 30
READY = b"ready\n"
_ROLE = re.compile(r"[A-Za-z0-9_-]+")
_SAID = ("content", "reasoning_content")


def _owned_messages(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The messages as the template gets them, see `owned_text.py`.

    A role is the template's if it is a plain name, because templates build marks with it: '<|' + message.role + '|>'.
    """
    return [{key: _owned_field(message, key) for key in message} for message in messages]


def _owned_field(message: Mapping[str, Any], key: str) -> Any:
    value = message[key]
    if key == "role" and _ROLE.fullmatch(value):
        return value
    return owned_by(value, ASSISTANT if message["role"] == "assistant" and key in _SAID else CALLER)


class Renderer:
    """Answers jobs with one template: what the worker does, without a process and its limits."""

    def __init__(self, setting: Mapping[str, Any]) -> None:
        """`setting`: the `source`, and the `special_tokens` and `control_tokens` that it may write."""
        self._setting = setting
        self._template: Any = None

    def answer(self, line: bytes) -> dict[str, Any]:
        """The text of the job in `line`, and runs of who wrote it; or why there is none."""
        import jinja2

        try:
            text = self._rendered(json.loads(line))
            runs = [[owner, len(list(run))] for owner, run in itertools.groupby(owners_of(text))]
            return {"text": text, "owners": runs}
        except jinja2.exceptions.SecurityError as error:
            return {"kind": "failed", "error": f"an access that is not allowed: {error}"}
        except jinja2.TemplateSyntaxError as error:
            return {"kind": "failed", "error": f"a syntax error in line {error.lineno}: {error}"}
        except jinja2.TemplateError as error:
            return {"kind": "refused", "error": str(error)}
        except Exception as error:
            return {"kind": "failed", "error": f"{type(error).__name__}: {error}"}

    def _rendered(self, job: Mapping[str, Any]) -> str:
        from dovetail.runtime.text.template_environment import TemplateEnvironment

        if self._template is None:
            environment = TemplateEnvironment(self._setting["control_tokens"])
            self._template = environment.from_string(self._setting["source"])
        variables = {
            "messages": _owned_messages(job["messages"]),
            "tools": owned_by(job["tools"], CALLER),
            "documents": None,
            "add_generation_prompt": job["add_generation_prompt"],
            **self._setting["special_tokens"],
            **{name: owned_by(value, CALLER) for name, value in job["variables"].items()},
        }
        text: str = self._template.render(variables)
        return text


def work() -> None:
    """Settings on the first line of stdin, a job on every further one; on stdout a word when ready, then an answer
    each."""
    import resource

    import dovetail.runtime.text.template_environment  # noqa: F401  # before it is ready, and before its limits

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    _write(READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # nobody reads on there
    renderer = Renderer(json.loads(sys.stdin.buffer.readline()))
    for line in sys.stdin.buffer:
        _write(_dumped(renderer.answer(line)) + b"\n")


def _dumped(answer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(answer).encode()
    except MemoryError:
        return b'{"kind": "failed", "error": "MemoryError"}'


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    work()
