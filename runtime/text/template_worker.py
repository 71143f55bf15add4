"""The process that renders a chat template in bounded memory: `chat_template.py` starts it, sends it jobs, and ends it
when it takes too long.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any

MAX_MEMORY_BYTES = 1 << 30


def _compile(source: str) -> Any:
    """The template as transformers would compile it: same options, filters, functions and tags."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}` marks an assistant's words for training; here it is its body."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

        def parse(self, parser: Any) -> Any:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=lineno)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def work() -> None:
    """Settings on the first line of stdin, a job on every further one, an answer each on stdout."""
    import resource

    import jinja2

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    setting = json.loads(sys.stdin.buffer.readline())
    template: Any = None
    for line in sys.stdin.buffer:
        answer: dict[str, str]
        try:
            template = template or _compile(setting["source"])
            answer = {"text": template.render(**setting["special_tokens"], **json.loads(line))}
        except jinja2.exceptions.SecurityError as error:
            answer = {"kind": "failed", "error": f"an access that is not allowed: {error}"}
        except jinja2.TemplateSyntaxError as error:
            answer = {"kind": "failed", "error": f"a syntax error in line {error.lineno}: {error}"}
        except jinja2.TemplateError as error:
            answer = {"kind": "refused", "error": str(error)}
        except Exception as error:
            answer = {"kind": "failed", "error": f"{type(error).__name__}: {error}"}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    work()
