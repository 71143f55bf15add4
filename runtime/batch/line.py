"""One line of a batch's input: its id, what it asks, and the controls of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.runtime.artifact.strict_json import shown
from dovetail.runtime.batch import openai_request
from dovetail.runtime.batch.question_file import LAYOUTS, parsed, question
from dovetail.runtime.errors import UserError

MAX_LINE_BYTES = 16 << 20
ID_KEYS = ("custom_id", "id", "question_id", "task_id")

LineId = str | int
Asked = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or messages."""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """`number` counts every line of the file from 1. Where `error` says why the line can't be done, nothing below
    counts, and `id` is None if that could not be read either.
    """

    number: int
    id: LineId | None
    is_openai: bool  # a line of an OpenAI batch file, whose answer gets that shape
    error: UserError | None = None
    asked: Asked = ""
    is_said: bool = False  # a person says the text to an assistant; else it is a text to continue
    is_chat: bool = False  # of OpenAI's two shapes of an answer, that of a chat
    controls: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def prompt(self, has_chat_template: bool) -> Asked:
        """What the pipeline is asked: what is said becomes a user's message where the model has a chat template."""
        if self.is_said and has_chat_template:
            return [{"role": "user", "content": self.asked}]
        return self.asked


def read_line(number: int, data: bytes, like_openai: bool) -> Line:
    """The line `data`. `like_openai`: the shape of a line that can't be read, that of the others in its file."""
    where = f"line {number}"
    try:
        entry = parsed(data, where, MAX_LINE_BYTES)
    except UserError as error:
        return Line(number, None, like_openai, error)
    is_openai = openai_request.is_request(entry)
    try:
        line_id = _id(entry, number, where)
    except UserError as error:
        return Line(number, None, is_openai, error)
    try:
        if is_openai:
            request = openai_request.read_request(entry, where)
            return Line(
                number,
                line_id,
                is_openai,
                asked=request.prompt,
                is_chat=request.is_chat,
                controls=request.controls,
                chat_template_kwargs=request.chat_template_kwargs,
            )
        if "messages" in entry:
            return Line(number, line_id, is_openai, asked=openai_request.messages(entry["messages"], where))
        asked = question(entry, number, where, f"messages, {LAYOUTS}")
    except UserError as error:
        return Line(number, line_id, is_openai, error)
    return Line(number, line_id, is_openai, asked=asked.turns[0], is_said=asked.is_said)


def _id(entry: dict[str, Any], number: int, where: str) -> LineId:
    """The line's own id, or else its number."""
    for key in ID_KEYS:
        own = entry.get(key)
        if own is not None:
            if type(own) not in (str, int):
                raise UserError(f"{where}: expected {key} as text or an integer, got {shown(own)}; correct it")
            return own  # type: ignore[no-any-return]  # checked the line before
    return number
