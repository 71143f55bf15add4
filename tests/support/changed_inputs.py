"""Inputs changed as what they are, for a fuzzer: JSON value by value, templates expression by expression."""

from __future__ import annotations

import json
import random
import re
from typing import Any


def _words(table: str) -> tuple[str, ...]:
    """Its entries, which line ends and wide gaps part."""
    return tuple(re.split(r"\s{2,}|\n", table.strip()))


_DEEP = (30, 90, 50_000)
_MARK = "\ue0ff"  # in a mutated document, where text that json.dumps would not write is to stand
_RAW = (
    *("NaN", "1e999", "-0", "1e-400", "9" * 25, "9" * 5000, '"\\ud800"', '"\\u0000"', "1.0", "1e2", "0.1e1"),
    *("[" * depth + "]" * depth for depth in _DEEP),
    *('{"a":' * depth + "1" + "}" * depth for depth in _DEEP),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-9, 1e300, 2**31, 2**32 - 1, 2**53 + 1, 2**63, 2**64 - 1, 10**18),
    *(
        "",
        " ",
        "x",
        "\n",
        "a\nb",
        "\x1b[2J",
        "\x7f",
        "\u202e",
        "é",
        "東",
        "x" * 70,
        "x" * 3000,
        "</s>",
        "05",
        "-1",
        "auto",
    ),
    *([], {}, [[]], [None], [0], [1, 1], ["x"], {"": 0}, {"a\nb": 1}, {"x": {}}, [{}], {"type": "text", "text": "a"}),
)

_ATOMS = (
    "messages[1].content",
    "messages[2].content",
    "bos_token",
    "messages[0].role",
    "tools[0].name",
    "'aB\\n '",
    "eos_token",
)
_TEXTS = _words("""
(T)|trim   (T)|upper   (T)|lower   (T)|title   (T)|capitalize   (T)|reverse   (T)|indent   (T)|center(40)
(T)|replace(T, T)   (none or T)|default(T)   (T)|string   (T)|wordwrap(9)   (T)|truncate(9)   (T)|first
(T)|last   (T).strip()   (T).strip(T)   (T).replace(T, T, 1)   (T).zfill(40)   (T).ljust(40, 'x')
(T).expandtabs(3)   (T).swapcase()   (T).casefold()   (T).removeprefix(T)   (T).rstrip(T)
(T).translate({97: 'bc'})   (T).title()   (T).rpartition(T)[2]   (T).partition(T)[0]   (T).rjust(40)
(T).lstrip()   (T).lower()   (T).capitalize()   (T) ~ (T)   (T) + (T)   (T) * 2   2 * (T)   (T)[1:]   (T)[::-1]
(T)[0]   (T)[-2:5]   (T)[1:][:3]   (T)|max   (T) if (T) else (T)   (T) if (T) in (T) else (T)   (T) or (T)
(L)|join   (L)|join(T)   (T).join(L)   (L)[0]   (L)[-1]   (L)|string   (L)|first   (L)|last   (L)|max
(L)|sum(start='')   {T: T}|string   (T)|string|length|string   (T).upper()
""")  # of texts T and lists L
_LISTS = _words("""
[T, T]   (T)|list   (T).split()   (T).split(T)   (T).rsplit(T, 1)   (T).splitlines()   (T).splitlines(true)
(T).partition(T)   (L)|map('upper')|list   (L)|unique|list   (L)|sort   (L) + (L)   (L)[1:]   (L)|reverse|list
(L)|map('trim')|list   (T)|slice(2)|map('join')|list   (T)|batch(3)|map('join')|list   (L)|select|list
messages|map(attribute='content')|list   {T: T}|list   (L)|reject('in', L)|list
""")
_PLACES = _words("""
{{ raise_exception(T) }}   {{ T }}   {% for x in L %}{{ x }}{% endfor %}   {% if T %}a{{ T }}{% endif %}
{% set v = T %}{{ v }}   {{ L }}   {% macro m(x) %}{{ x }}{% endmacro %}{{ m(T) }}
{%- set n = namespace(a=T) -%}{{ n.a }}   {% set v = L %}{{ v[0] }}   {% filter upper %}{{ T }}{% endfilter %}
{% set v %}{{ T }}b{% endset %}{{ v }}   {% for x in T %}{{ x ~ T }}{% endfor %}
{% set n = namespace(a=T) %}{% for x in L %}{% set n.a = n.a + x %}{% endfor %}{{ n.a }}
{% macro m(x) %}{{ caller(x) }}{% endmacro %}{% call(y) m(T) %}{{ y }}{% endcall %}
""")
_TEMPLATE_WORDS = """
{{ }} {% %} | for in endfor if endif set endset macro endmacro call endcall filter endfilter namespace break recursive
abs batch capitalize center default dictsort filesizeformat first float format groupby indent int items join last
length list lower map max min pprint random reject rejectattr replace reverse round select selectattr slice sort string
striptags sum title trim truncate unique upper urlize wordcount wordwrap xmlattr tojson split strip lstrip rstrip
startswith endswith partition rpartition splitlines find removeprefix zfill ljust rjust expandtabs translate swapcase
casefold encode isdigit count index loop.index0 messages content role continue
"""


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in items for path in places(item, (*at, key)))]


def changed_document(document: Any, dice: random.Random) -> str:
    """JSON with one to three changes."""
    root, raw = [document], ""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        *before, key = dice.choice(places(root)[1:])
        holder: Any = root
        for step in before:
            holder = holder[step]
        kind = dice.randrange(8)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[dice.choice([*(value for value in _VALUES if isinstance(value, str)), key + "2", key.upper()])] = (
                holder.pop(key)
            )
        elif kind == 2:  # a value of another place
            other = dice.choice(places(root)[1:])
            value: Any = root
            for step in other:
                value = value[step]
            holder[key] = json.loads(json.dumps(value))
        elif kind == 3 and isinstance(holder, list) and holder is not root:
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif kind == 4 and type(holder[key]) in (int, float):
            holder[key] = dice.choice((-1, 2, 0.5, 1000, 1e30)) * holder[key] + dice.choice((0, 0, 1, -1))
        elif kind == 5 and not raw:
            holder[key], raw = _MARK, dice.choice(_RAW)
        elif kind == 6 and isinstance(holder, dict):
            holder[dice.choice(["new", key + " ", "id", "error", "type", "input"])] = dice.choice(_VALUES)
        else:
            alike = [value for value in _VALUES if type(value) is type(holder[key])]
            holder[key] = dice.choice(alike if alike and dice.random() < 0.6 else _VALUES)
    return _written(root[0], raw, dice)


def _written(document: Any, raw: str, dice: random.Random) -> str:
    """As JSON, with `raw` in its place."""
    if raw[:2] == "[[" and dice.random() < 0.5:
        depth = dice.randrange(80, 1000)
        raw = "[" * depth + "]" * depth
    text = json.dumps(document, ensure_ascii=dice.random() < 0.5)
    if dice.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return text.replace('"\ue0ff"', raw).replace('"\\ue0ff"', raw)


def expression(dice: random.Random, form: str, depth: int) -> str:
    """`form`, each T in it a text and each L a list, of what a chat template has."""

    def one(found: re.Match[str]) -> str:
        if found[0] == "L":
            return expression(dice, dice.choice(_LISTS if depth > 0 else ("[T, T]", "(T).split(T)")), depth - 1)
        return expression(dice, dice.choice(_TEXTS), depth - 1) if depth > 0 else dice.choice(_ATOMS)

    return re.sub(r"\b[TL]\b", one, form)


def changed_template(source: str, dice: random.Random) -> str:
    """A template with one more expression, or with more in one."""
    found = list(re.finditer(r"\{\{(.*?)\}\}", source))
    if found and dice.random() < 0.5:
        one = dice.choice(found)
        form = dice.choice([text for text in _TEXTS if text.startswith("(T)")]).replace("T", "\ue000", 1)
        inner = expression(dice, form, dice.randrange(2)).replace("\ue000", one[1])
        return f"{source[: one.start()]}{{{{ {inner} }}}}{source[one.end() :]}"
    new = expression(dice, dice.choice(_PLACES), dice.randrange(3))
    at = dice.choice([0, len(source), *(one.end() for one in found)])
    return source[:at] + new + source[at:]


def changed(kind: str, data: bytes, dice: random.Random) -> bytes | None:
    """`data` changed as what it is; None where it is none of that kind."""
    try:
        if kind == "json":
            return changed_document(json.loads(data), dice).encode("utf-8", "surrogatepass")
        if kind == "template":
            return changed_template(data.decode() if dice.random() < 0.8 else "", dice).encode()
        if kind == "lines":
            lines = data.split(b"\n")
            at = dice.randrange(len(lines))
            action = dice.randrange(8)
            if action == 0:
                del lines[at]
            elif action == 1:
                lines.insert(at, dice.choice(lines))
            elif action == 2:
                lines[at] = dice.choice((b"", b"\r", b" ", b"\xef\xbb\xbf", b"{}", b"[]", b"\xff"))
            else:
                lines[at] = changed_document(json.loads(lines[at]), dice).encode("utf-8", "surrogatepass")
            return b"\n".join(lines)
        if kind == "header":  # of safetensors
            length = int.from_bytes(data[:8], "little")
            text = changed_document(json.loads(data[8 : 8 + length]), dice).encode("utf-8", "surrogatepass")
            return len(text).to_bytes(8, "little") + text + data[8 + length :]
    except (ValueError, RecursionError, IndexError, TypeError, KeyError, OverflowError):
        pass
    return None


def dictionary(kind: str, seeds: list[bytes]) -> list[str]:
    """Words for libFuzzer: those of the seeds, and some that mean something in a file that is read here."""
    words = {word for seed in seeds for word in re.findall(rb"[A-Za-z_.]{3,30}", seed)}
    words |= {(1 << bits).to_bytes(8, "little") for bits in (16, 31, 32, 40, 62, 63)} | {b"\xff" * 8, b"null", b"\r\n"}
    if kind == "template":
        words |= {word.encode() for word in _TEMPLATE_WORDS.split()}
    return ['"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in sorted(words)]
