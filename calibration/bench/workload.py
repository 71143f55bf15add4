"""What a benchmark asks where it is given no questions: held-out code to complete, to copy-edit and to continue."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.standard_library import held_out_files, path_hash

COMPLETE, EDIT, LONG = "complete", "copy-edit", "long file"
GROWTH = "growing context"
ALL, MEAN = "all", "mean"
OWN_NAMES = (ALL, MEAN, GROWTH)
"""Names that stand where a category's does, and are none."""
LONG_TOKENS = 1500
GROWTH_CONTEXTS = (200, 500, 1000, 1500, 2000)
_FUNCTION_CHARACTERS = range(300, 2400)

Encode = Callable[[str], list[int]]
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to continue. `category` is what kind of use it stands for, `source` where it comes from, `num_tokens`
    how long its text is, where that is known.
    """

    category: str
    source: str
    ids: list[int]
    num_tokens: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """How many prompts of each category."""

    complete: int = 6
    edit: int = 4
    long: int = 3


QUICK = Sizes(2, 1, 1)


def standard_prompts(encode: Encode, sizes: Sizes, room: int) -> list[Prompt]:
    """Held-out standard-library functions to complete (signature and docstring, as HumanEval asks), code to copy with
    one name changed, and files of up to 1,500 tokens to go on with. Each is cut at its front to `room` tokens.

    The same prompts every time: files are chosen by the hash of their path. Raises `UserError` where this
    interpreter comes without its standard library's sources.
    """
    files = sorted(held_out_files(), key=lambda file: path_hash(file[0]))
    functions = [
        (f"{name}:{node.name}", node, source) for name, text in files for node, source in _first_functions(text)
    ]
    long_files = [(name, text) for name, text in files if len(text) > 3 * LONG_TOKENS]
    if not functions or not long_files:
        raise UserError(
            "expected the held-out files of Python's standard library, got none; install its sources or give `prompts`"
        )
    prompts = []
    for name, node, source in spread(functions, sizes.complete):
        prompts.append(Prompt(COMPLETE, name, cut(encode(_head(node, source)), room)))
    for name, node, source in spread(functions[1:], sizes.edit):  # one further, so that none serves twice by chance
        prompts.append(Prompt(EDIT, name, cut(encode(_copy_edit(node, source)), room)))
    for name, text in spread(long_files, sizes.long):
        prompts.append(Prompt(LONG, name, cut(encode(text)[:LONG_TOKENS], room)))
    return prompts


def growth_prompts(encode: Encode, room: int) -> list[Prompt]:
    """The first 200, 500, ... 2,000 tokens of the same held-out text, as far as `room` allows."""
    text = "\n".join(
        text for _, text in sorted(held_out_files(), key=lambda file: -len(file[1]))[:1]
    )  # one file, as long as they come
    ids = encode(text)
    return [
        Prompt(GROWTH, str(context), ids[:context]) for context in GROWTH_CONTEXTS if context <= min(room, len(ids))
    ]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of them, evenly spread; all if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def cut(ids: list[int], room: int) -> list[int]:
    """The last `room` tokens, the first one kept: it may mark the start of a text."""
    return ids if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


def _first_functions(text: str, count: int = 3) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Up to `count` functions or methods of a file that have a docstring and a body worth writing, with their source
    moved to the left margin.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 3:
            continue
        source = textwrap.dedent("".join(text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]))
        if len(source) in _FUNCTION_CHARACTERS:
            yield node, source
            count -= 1
            if not count:
                return


def _head(node: ast.FunctionDef, source: str) -> str:
    """Signature and docstring."""
    end = node.body[0].end_lineno
    assert end is not None
    return "".join(source.splitlines(keepends=True)[: end - node.lineno + 1])


def _copy_edit(node: ast.FunctionDef, source: str) -> str:
    """The function, what is to change, and how its new version begins."""
    new = f"{node.name}_again"
    signature = "".join(source.splitlines(keepends=True)[: node.body[0].lineno - node.lineno])
    begun = signature.replace(f"def {node.name}(", f"def {new}(", 1)
    return f"{source}\n\n# The same function, renamed to {new}:\n{begun}"
