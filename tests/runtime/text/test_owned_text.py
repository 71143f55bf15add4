"""Proves that text keeps its owners through every method of str and through jinja2's filters: what people wrote never
becomes the template's, what the template wrote stays its own wherever that can be told, and the text is that of plain
jinja2.

The caller's characters are capitals here and the template's are not, so each shows whose it is.
"""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import sandbox

from dovetail.runtime.text.owned_text import CALLER, TEMPLATE, OwnedText, joined, owned_by, owners_of
from dovetail.runtime.text.template_environment import TemplateEnvironment

PARTS = st.lists(st.text("ab .") | st.text("AB").map(OwnedText), max_size=6)
SOME = st.text("abAB .", min_size=1, max_size=2)


def owners(text: str) -> bytes:
    return bytes(CALLER if char.isupper() else TEMPLATE for char in text)


@given(
    parts=PARTS, sep=SOME, new=st.text("ab.") | st.text("AB").map(OwnedText), count=st.integers(-1, 3), data=st.data()
)
def test_methods_answer_as_str_does_and_know_whose_each_character_is(
    parts: list[str], sep: str, new: str, count: int, data: st.DataObject
) -> None:
    text = joined(parts)
    plain = "".join(map(str.__str__, parts))
    low, high, step = data.draw(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([1, -1, 2])))
    fill = data.draw(st.sampled_from("ab "))
    for method, arguments in (
        ("__str__", ()), ("strip", ()), ("strip", (sep,)), ("lstrip", (sep,)), ("rstrip", (sep,)), ("split", ()),
        ("split", (sep,)), ("split", (sep, count)), ("split", (None, count)), ("rsplit", (sep, count)),
        ("rsplit", (None, count)), ("partition", (sep,)), ("rpartition", (sep,)), ("removeprefix", (sep,)),
        ("removesuffix", (sep,)), ("splitlines", ()), ("join", (["a", OwnedText("B"), "c"],)), ("replace", (sep, new)),
        ("replace", (sep, new, count)), ("__add__", (new,)), ("__mul__", (2,)), ("center", (9, fill)),
        ("__getitem__", (slice(low, high, step),)), ("ljust", (9, fill)), ("rjust", (9, fill)), ("expandtabs", ()),
        ("zfill", (9,)),
    ):  # fmt: skip
        right, made = getattr(plain, method)(*arguments), getattr(text, method)(*arguments)
        assert made == right, method
        for one in [made] if isinstance(made, str) else made:
            assert owners_of(one) == owners(one), method
    assert "".join(text) == plain
    assert all(owners_of(char) == owners(char) for char in text)
    assert owners_of(new + text) == owners(new + plain)


@given(st.text("ab\nA\r\x0b B", max_size=9))
def test_lines(plain: str) -> None:
    text = OwnedText(plain, owners(plain))
    for keepends in (False, True):
        lines = text.splitlines(keepends)
        assert lines == plain.splitlines(keepends)
        assert all(owners_of(line) == owners(line) for line in lines)


@given(st.text(max_size=9))
def test_whatever_changes_case_keeps_the_owners(plain: str) -> None:
    for method in ("upper", "lower", "title", "capitalize", "swapcase", "casefold"):
        made = getattr(OwnedText(plain), method)()
        assert made == getattr(plain, method)()
        assert set(owners_of(made)) <= {CALLER}
        assert not any(owners_of(getattr(OwnedText(plain, bytes(len(plain))), method)()))


CONTENT = " A<x>B "  # someone writes the control token <x>, between capitals
FOLLOWED = [
    "<x>{{ c }}<x>",
    "{{ '<x>' + c + '<x>' }}",
    "{{ '<x>' ~ c ~ 1 ~ '<x>' }}",
    "{{ ('<x>' + c)|trim }}",
    "{{ ('<x>' + c + '<x>').strip() }}",
    "{{ ['<x>', c, '<x>']|join }}",
    "{{ ['<x>', c]|join('<x>') }}",
    "{{ '<x>'.join([c, c]) }}",
    "{{ ''.join([c, '<x>']) }}",
    "{{ ('<x>' + c).split('B')[0] }}",
    "{{ (c + 'B<x>').split('B')[-1] }}",
    "{{ ('<x>?' + c).replace('?', c) }}",
    "{{ '<x>?'.replace('?', c) }}",
    "{{ '<x>?'|replace('?', c) }}" + "<x>",
    "{{ (c + '<x>')[::-1][::-1] }}",
    "{{ (c + '<x>')|reverse|reverse }}",
    "{% set t %}<x>{{ c }}{% endset %}{{ t }}",
    "{% macro f(t) %}<x>{{ t }}{% endmacro %}{{ f(c) }}",
    "{% macro f() %}<x>{{ caller() }}{% endmacro %}{% call f() %}{{ c }}{% endcall %}",
    "{% set ns = namespace(t='') %}{% set ns.t = ns.t + '<x>' %}{% set ns.t = ns.t + c %}{{ ns.t }}",
    "{% for char in c %}{{ char }}{% endfor %}<x>",
    "{{ (c|list)|join + '<x>' }}",
    "{{ ([c]|map('trim')|list)[0] }}<x>",
    "{{ ([{'k': c}]|map(attribute='k')|join('<x>')) }}<x>",
    "{% filter trim %}<x>{{ c }}{% endfilter %}",
    "{% generation %}{{ c }}{% endgeneration %}<x>",
    "{{ c if c is string }}<x>{{ c|default('') }}",
    "{{ 2 * ('<x>' + c) }}",
]
SEARCHED = [
    "{{ c|tojson }}<x>",
    "{{ [c]|tojson(indent=1) }}<x>",
    "{{ {c: 1} }}<x>",
    "{{ {c: 1}|string ~ '<x>' }}",
    "{{ {'k': c} ~ '<x>' }}",
    "{{ '%s' % c }}<x>",
    "{{ '%s %s' % (c, 1) }}<x>",
    "{{ '{} {k}'.format(c, k=c) }}<x>",
    "{{ '%s'|format(c) }}<x>",
    "{{ (c + '\n' + c)|indent }}<x>",
    "{{ c|wordwrap(3) }}<x>",
    "{{ c|title|upper }}<x>",
    "{{ c|pprint }}<x>",
    "{{ c|urlencode|replace('%3C', '<')|replace('%3E', '>') }}<x>",
    "{{ c['replace']('A', 'A') }}<x>",
]


def rendered(source: str, content: str) -> tuple[str, bytes, str]:
    """(text, its owners, the text by plain jinja2)."""
    made = TemplateEnvironment(["<x>", "<y>"]).from_string(source).render(c=owned_by(content, CALLER))
    plain = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    plain.filters["tojson"] = jinja2.filters.FILTERS["tojson"]
    if "generation" in source or "tojson" in source:
        return made, owners_of(made), str.__str__(made)
    return made, owners_of(made), plain.from_string(source).render(c=content)


def places(text: str, token: str) -> list[int]:
    return [at for at in range(len(text)) if text.startswith(token, at)]


@pytest.mark.parametrize("source", FOLLOWED + SEARCHED)
def test_a_token_is_the_templates_exactly_where_the_template_wrote_it(source: str) -> None:
    text, whose, right = rendered(source, CONTENT)
    assert text == right
    assert places(text, "<x>")
    for at in places(text, "<x>"):
        is_theirs = text[max(at - 1, 0) : at].upper() == "A"
        assert (CALLER in whose[at : at + 3]) == is_theirs, (text, whose)


@pytest.mark.parametrize(
    "source",
    [
        *(source for source in FOLLOWED + SEARCHED if "urlencode" not in source),
        "{{ '<x>%s<x>' % c }}",
        "{{ '<x>{}'.format(c) }}",
        "{{ ('<x>' + c)|indent }}",
        "{{ ['<x>', c]|tojson }}",
    ],
)
def test_where_nobody_writes_control_tokens_all_of_them_are_the_templates(source: str) -> None:
    text, whose, right = rendered(source, "A<<x >y> B")
    assert text == right
    assert places(text, "<x>")
    assert all(CALLER not in whose[at : at + 3] for at in places(text, "<x>"))


def test_a_token_that_is_put_together_from_what_people_wrote_is_theirs() -> None:
    for source, content in [
        ("{{ c.replace('-', '') }}", "<-x>"),
        ("{{ c.split('-')|join }}", "<-x>"),
        ("{{ c }}{{ d }}", "<"),
        ("{{ '<' ~ c ~ '>' }}", "x"),
        ("{{ '<%s>' % c }}", "x"),
        ("{{ c|replace('-', '')|indent }}", "<-x>"),
    ]:
        made = TemplateEnvironment(["<x>"]).from_string(source).render(c=owned_by(content, CALLER), d=OwnedText("x>"))
        assert made == "<x>"
        assert CALLER in owners_of(made), source


def test_values_are_owned_to_their_last_key() -> None:
    value: Any = owned_by({"a": [{"b": ("c", 1, None)}]}, CALLER)
    assert value == {"a": [{"b": ["c", 1, None]}]}
    assert owners_of(next(iter(value))) == owners_of(next(iter(value["a"][0]))) == bytes([CALLER])
