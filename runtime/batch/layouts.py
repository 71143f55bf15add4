"""The question files that a batch and a benchmark read: which keys of a line hold the text, and who says it.

>>> question({"turns": ["Write a poem.", "Make it shorter."]}, "line 1")
Question(layout='mt-bench', text='Write a poem.', is_said=True)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import ArtifactError, UserError

LAYOUTS = "turns (MT-bench), prompt (HumanEval), question (GSM8K), or instruction and input (Alpaca)"


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What a line asks. `is_said`: a person says it to an assistant; else it is a text to continue."""

    layout: str
    text: str
    is_said: bool


def parsed(line: bytes, where: str, max_bytes: int) -> dict[str, Any]:
    """The object of one line. Raises `UserError` that calls the line `where`."""
    try:
        entry = strict_json.parse(line, where, max_bytes, "correct the line")
    except ArtifactError as error:  # the strict reader takes every file for an artifact's
        raise UserError(str(error)) from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, got {strict_json.shown(entry)}; write one JSON object a line")
    return entry


def question(entry: dict[str, Any], where: str, layouts: str = LAYOUTS) -> Question:
    """What the object of a line asks: of several turns the first, of an instruction its input too. Raises `UserError`
    that calls the line `where` and names the `layouts` that the caller reads.
    """
    turns = entry.get("turns")
    if isinstance(turns, list) and turns and isinstance(turns[0], str) and turns[0].strip():
        return Question("mt-bench", turns[0], True)
    if _is_text(entry, "question"):
        return Question("gsm8k", entry["question"], True)
    if _is_text(entry, "instruction"):
        text = "\n\n".join(filter(None, [entry["instruction"], str(entry.get("input") or "")]))
        return Question("alpaca", text, True)
    if _is_text(entry, "prompt"):
        return Question("humaneval" if "entry_point" in entry else "prompt", entry["prompt"], False)
    raise UserError(
        f"{where}: expected the keys {layouts} with text, got {strict_json.shown(sorted(entry))}; rename them"
    )


def _is_text(entry: dict[str, Any], key: str) -> bool:
    return isinstance(entry.get(key), str) and bool(entry[key].strip())
