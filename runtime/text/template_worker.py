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


def work() -> None:
    """Settings on the first line of stdin, a job on every further one; on stdout a word when ready, then an answer
    each."""
    import resource

    import jinja2

    from dovetail.runtime.text.template_environment import TemplateEnvironment

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    _write(READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # nobody reads on there
    setting = json.loads(sys.stdin.buffer.readline())
    template: Any = None
    for line in sys.stdin.buffer:
        try:
            template = template or TemplateEnvironment(setting["control_tokens"]).from_string(setting["source"])
            job = json.loads(line)
            variables = {
                "messages": _owned_messages(job["messages"]),
                "tools": owned_by(job["tools"], CALLER),
                "documents": None,
                "add_generation_prompt": job["add_generation_prompt"],
                **setting["special_tokens"],
                **{name: owned_by(value, CALLER) for name, value in job["variables"].items()},
            }
            text = template.render(variables)
            runs = [[owner, len(list(run))] for owner, run in itertools.groupby(owners_of(text))]
            _answer({"text": text, "owners": runs})
        except jinja2.exceptions.SecurityError as error:
            _answer({"kind": "failed", "error": f"an access that is not allowed: {error}"})
        except jinja2.TemplateSyntaxError as error:
            _answer({"kind": "failed", "error": f"a syntax error in line {error.lineno}: {error}"})
        except jinja2.TemplateError as error:
            _answer({"kind": "refused", "error": str(error)})
        except Exception as error:
            _answer({"kind": "failed", "error": f"{type(error).__name__}: {error}"})


def _answer(document: dict[str, Any]) -> None:
    _write(json.dumps(document).encode() + b"\n")


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    work()
