"""What the target goes on with while it is calibrated: what is accepted of a draft depends on what is said.

A chat model is asked: with questions of a file, or with its own. Any other model continues passages of a text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from dovetail.calibration.bench.questions import some_of_each
from dovetail.runtime.artifact.manifest import CHAT_TEMPLATE
from dovetail.runtime.artifact.strict_json import printable
from dovetail.runtime.batch.question_file import Question
from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.exchanges import self_made_questions

if TYPE_CHECKING:
    from dovetail.runtime.pipeline import Pipeline

_FIRST_SELF_MADE = 1_000_000  # drafts are trained on those from 0 on, and would look better on them than they are


@dataclasses.dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids to go on with. The first ones are like the rest, so whoever needs only some takes those.

    >>> Prompts("question", " of vicuna_80.jsonl", []).described(12)
    '12 questions of vicuna_80.jsonl'
    """

    noun: str
    origin: str
    token_ids: list[list[int]]

    def described(self, count: int) -> str:
        """So many of them, in words for a report."""
        return f"{count} {self.noun}{'' if count == 1 else 's'}{self.origin}"


def passages(tokens: Sequence[int], count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens, spread evenly over `tokens`. Raises `UserError` when that is too short."""
    needed = count * length
    if len(tokens) < needed:
        raise UserError(
            f"text: expected at least {needed} tokens ({count} passages of {length}) to estimate acceptance, got "
            f"{len(tokens)}; give a longer text, or leave it out"
        )
    step = (len(tokens) - length) // max(count - 1, 1)
    return [list(tokens[i * step : i * step + length]) for i in range(count)]


def passages_of(name: str, tokens: Sequence[int], count: int, length: int) -> Prompts:
    """Passages of the text called `name`, mixed. Raises `UserError` when it is too short."""
    return Prompts("passage", f" of {printable(name)}", _mixed(passages(tokens, count, length)))


def questions_of(name: str, questions: Iterable[Question], pipe: Pipeline, count: int) -> Prompts:
    """The first turns of up to `count` questions of the file called `name`, equally many of each category, mixed. What
    is said goes through the chat template, if there is one. Those that fill more than half of the context are left out.

    Raises `UserError` where all do.
    """
    has_template = pipe.artifact.has(CHAT_TEMPLATE)
    encoded = [
        pipe.encode([{"role": "user", "content": one.turns[0]}] if one.is_said and has_template else one.turns[0])
        for one in some_of_each(list(questions), count)
    ]
    longest = pipe.ctx_size // 2
    short = [ids for ids in encoded if len(ids) <= longest]
    if not short:
        raise UserError(
            f"{name}: expected questions of at most {longest} tokens, got {len(encoded)} that are all longer; shorten "
            "some"
        )
    return Prompts("question", f" of {printable(name)}", _mixed(short))


def conversations(pipe: Pipeline, count: int, progress: Callable[[float], None] = lambda share: None) -> Prompts:
    """`count` questions that the chat model `pipe` makes up, the same every time. Raises `UserError` where it has no
    chat template, or says nothing that can be asked.
    """
    prompts = []
    with contextlib.closing(self_made_questions(pipe, _FIRST_SELF_MADE, pipe.ctx_size // 2)) as questions:
        for question in itertools.islice(questions, count):
            prompts.append(pipe.encode([{"role": "user", "content": question.text}]))
            progress(len(prompts) / count)
    return Prompts("conversation", ", self-made", prompts)


def _mixed(prompts: list[list[int]]) -> list[list[int]]:
    """In a random order, which is always the same: neighbours in a file are alike."""
    return random.Random(0).sample(prompts, len(prompts))
