"""What `dovetail calibrate` asks, or continues, by its flags."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.runtime.errors import UserError

if TYPE_CHECKING:
    from dovetail.calibration.choose.calibration import Effort
    from dovetail.calibration.measure.prompts import Prompts
    from dovetail.runtime.batch.question_file import Question
    from dovetail.runtime.pipeline import Pipeline

_MAX_TEXT_BYTES = 4 << 20
_TEXT_CHARACTERS = 100_000  # that are read: far more than the passages that are picked

TellWhat = Callable[[str, float], None]
"""Told what is being done, and the share of it that is."""
FindPrompts = Callable[["Pipeline", "Effort", TellWhat], "Prompts"]
"""What is asked of an open pipeline."""


def by_flags(prompts: Path | None, text: Path | None) -> FindPrompts:
    """Questions of the file `prompts`; passages of the file `text`; by default a chat model's own questions, and for
    others passages of Python's library. Files are read at once. Raises `UserError`.
    """
    if prompts is not None:
        from dovetail.runtime.batch.question_file import read_questions

        return functools.partial(_asked, prompts.name, read_questions(prompts))
    if text is not None:
        return functools.partial(_continued, text.name, read_text(text))
    return _by_default


def _asked(name: str, questions: list[Question], pipe: Pipeline, effort: Effort, progress: TellWhat) -> Prompts:
    from dovetail.calibration.measure.prompts import questions_of

    return questions_of(name, questions, pipe, effort.questions)


def _continued(name: str, text: str, pipe: Pipeline, effort: Effort, progress: TellWhat) -> Prompts:
    from dovetail.calibration.measure.prompts import passages_of

    return passages_of(name, pipe.encode(text), effort.passages, min(effort.passage_tokens, pipe.ctx_size // 4))


def _by_default(pipe: Pipeline, effort: Effort, progress: TellWhat) -> Prompts:
    from dovetail.calibration.measure.prompts import conversations
    from dovetail.runtime.artifact.manifest import CHAT_TEMPLATE

    if pipe.artifact.has(CHAT_TEMPLATE):
        return conversations(pipe, effort.conversations, functools.partial(progress, "making up questions"))
    return _continued("Python's standard library", library_text(), pipe, effort, progress)


def read_text(path: Path) -> str:
    """The beginning of a text. Raises `UserError` for a file that is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_TEXT_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise UserError(f"--text {path}: expected a readable file, got {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--text {path}: expected text in UTF-8, got {error.reason} at byte {error.start}; convert it"
        ) from None
    if len(data) > _MAX_TEXT_BYTES:
        raise UserError(f"--text {path}: expected at most {_MAX_TEXT_BYTES} bytes, got more; give a part of it")
    if not text:
        raise UserError(f"--text {path}: expected some text, got an empty file; give a longer one")
    return text[:_TEXT_CHARACTERS]


def library_text() -> str:
    """Files of the running interpreter's standard library that no model of ours was trained on."""
    from dovetail.runtime.evaluation.standard_library import held_out_files

    text = ""
    for _, content in held_out_files():
        text += content
        if len(text) > _TEXT_CHARACTERS:
            break
    if not text:
        raise UserError("expected this Python's library as source files, got none; give a text with --text")
    return text[:_TEXT_CHARACTERS]
