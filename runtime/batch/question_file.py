"""Files of questions, a JSON object a line, as benchmarks and instruction sets are published: which keys of a line hold
the text, who says it, and what it is about. A batch, a benchmark, calibration and training read them here.

>>> question({"category": "writing", "turns": ["Write a poem.", "Make it shorter."]}, 1, "line 1")
Question(number=1, layout='mt-bench', turns=('Write a poem.', 'Make it shorter.'), category='writing', is_said=True)
"""

from __future__ import annotations

import codecs
import dataclasses
from pathlib import Path
from typing import Any

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import ArtifactError, UserError

LAYOUTS = "turns (MT-bench), prompt (HumanEval), question (GSM8K), or instruction and input (Alpaca)"
_MAX_FILE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What line `number` asks: one text, or the `turns` of a person who gets an answer to each. `is_said`: said to an
    assistant; else it is a text to continue. `category` is the line's own word for its subject.
    """

    number: int
    layout: str
    turns: tuple[str, ...]
    category: str | None
    is_said: bool


def read_questions(path: Path) -> list[Question]:
    """All questions of a file, which is held in memory; blank lines don't count. Raises `UserError` that names the file
    and the line.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UserError(f"{path}: expected at most {_MAX_FILE_BYTES >> 20} MiB of questions, got more; shorten it")
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got {error.strerror}; check the path") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            questions.append(question(parsed(line, where, _MAX_FILE_BYTES), number, where))
    if not questions:
        raise UserError(f"{path}: expected a JSON object a line, got an empty file; give some questions")
    return questions


def parsed(line: bytes, where: str, max_bytes: int) -> dict[str, Any]:
    """The object of one line. Raises `UserError` that calls the line `where`."""
    try:
        entry = strict_json.parse(line, where, max_bytes, "correct the line")
    except ArtifactError as error:  # the strict reader takes every file for an artifact's
        raise UserError(str(error)) from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, got {strict_json.shown(entry)}; write one JSON object a line")
    return entry


def question(entry: dict[str, Any], number: int, where: str, layouts: str = LAYOUTS) -> Question:
    """What the object of a line asks; an instruction with its input. Raises `UserError` that calls the line `where` and
    names the `layouts` that the caller reads.
    """
    own = entry.get("category")
    category = own if isinstance(own, str) and own.strip() else None
    turns = entry.get("turns")
    if isinstance(turns, list) and turns and all(map(_is_text, turns)):
        return Question(number, "mt-bench", tuple(turns), category, True)
    if _is_text(entry.get("question")):
        return Question(number, "gsm8k", (entry["question"],), category, True)
    if _is_text(entry.get("instruction")):
        instances = entry.get("instances")
        layout, given = ("alpaca", entry) if instances is None else ("self-instruct", _first(instances))
        text = "\n\n".join(filter(None, [entry["instruction"], str(given.get("input") or "")]))
        return Question(number, layout, (text,), category, True)
    if _is_text(entry.get("prompt")):
        layout = "humaneval" if "entry_point" in entry else "prompt"
        return Question(number, layout, (entry["prompt"],), category, False)
    raise UserError(
        f"{where}: expected the keys {layouts} with text, got {strict_json.shown(sorted(entry))}; rename them"
    )


def _first(instances: Any) -> dict[str, Any]:
    """The first of a seed task's examples: each has an input of its own, or an empty one."""
    is_one = isinstance(instances, list) and instances and isinstance(instances[0], dict)
    return instances[0] if is_one else {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
