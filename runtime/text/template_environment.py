"""jinja2 as transformers sets it up for chat templates, and besides it follows who wrote what (`owned_text.py`).

Where a text passes through something that is not followed (a filter that builds it anew, a format), its owners are
found by searching: see `owned_by_search`.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import compiler, ext, filters, nodes, sandbox

from dovetail.runtime.text.owned_text import OwnedText, joined, owned, owned_by_search

# These give a text of their input as it is, or by one of `OwnedText`'s methods.
_FOLLOWED = frozenset({"d", "default", "first", "join", "last", "lower", "max", "min", "random", "replace", "reverse"})
_FOLLOWED |= {"string", "sum", "trim", "upper"}


class _Generation(ext.Extension):
    """`{% generation %}` marks an assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Code(compiler.CodeGenerator):
    """Lets the environment join the operands of `~`; jinja2's own way makes a plain text of them."""

    def visit_Concat(self, node: nodes.Concat, frame: compiler.Frame) -> None:
        self.write("environment.concat((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")


class TemplateEnvironment(sandbox.ImmutableSandboxedEnvironment):
    """Options, filters, functions and tags of transformers' `apply_chat_template`."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"%"})

    def __init__(self, control_tokens: Iterable[str] = ()) -> None:
        """`control_tokens`: those that the template itself may write."""
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols], finalize=self._shown
        )
        self._control_tokens = tuple(control_tokens)
        self.filters |= {"tojson": _tojson, "join": _join}
        self.filters = {name: self._followed(name, one) for name, one in self.filters.items()}
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def concat(self, parts: Iterable[Any]) -> str:  # there it is "".join itself
        """What jinja2 joins its output with."""
        texts = [str(self._shown(part)) for part in parts]
        return joined(texts) if any(isinstance(text, OwnedText) for text in texts) else "".join(texts)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """See jinja2. The template's own texts have methods that follow, too: they may join people's."""
        return super().getattr(_followable(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """See jinja2."""
        return super().getitem(_followable(obj), argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See jinja2."""
        form = super().wrap_str_format(value)
        if form is None:
            return None
        return lambda *args, **kwargs: self._searched(form(*args, **kwargs), [value.__self__, args, kwargs])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See jinja2; of the operators only `%` comes here."""
        result = super().call_binop(context, operator, left, right)
        return self._searched(result, [left, right]) if isinstance(result, str) else result

    def _shown(self, value: Any) -> Any:
        """A value that is put into the text."""
        is_container = isinstance(value, (Mapping, list, tuple))
        return self._searched(str(value), value) if is_container else value

    def _searched(self, text: str, sources: Any) -> str:
        return owned_by_search(text, sources, self._control_tokens)

    def _followed(self, name: str, one: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(one)  # with the marks that say what jinja2 must pass
        def follow(*args: Any, **kwargs: Any) -> Any:
            result = one(*map(_followable, args), **kwargs)
            is_followed = not isinstance(result, str) or (isinstance(result, OwnedText) and name in _FOLLOWED)
            return result if is_followed else self._searched(result, [args, kwargs])

        return follow


def _followable(value: Any) -> Any:
    return owned(value) if type(value) is str else value


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes what HTML must not hold."""
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


@jinja2.pass_environment
def _join(environment: TemplateEnvironment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    """jinja2's own, but for who wrote what."""
    parts = value if attribute is None else map(filters.make_attrgetter(environment, attribute), value)
    separated: list[Any] = []
    for part in parts:
        separated += [d, part]
    return environment.concat(separated[1:])
