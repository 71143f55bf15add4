"""What a chat model says: questions, its own or given ones, with its answers. Training draws drafts from them,
calibration learns from them what is accepted.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.runtime.batch.question_file import read_questions
from dovetail.runtime.decoding.feed import Request
from dovetail.runtime.errors import ContextOverflowError, UserError
from dovetail.runtime.sampling.config import GenerationConfig

if TYPE_CHECKING:
    from dovetail.runtime.pipeline import Pipeline

ANSWER_TOKENS = 320
SELF_MADE = "self-made:"
_QUESTION_TOKENS = 400
_FEWEST_CHARACTERS = 8
_PATIENCE = 64  # questions in a row that are of no use
_OPENINGS = ("The", "1", "why", "(")  # texts without a first token in common


@dataclasses.dataclass(frozen=True, slots=True)
class FirstTurn:
    """What a person says to begin with. `source` says where it is from and is no other's: `seeds.jsonl:12`,
    `self-made:7`.
    """

    source: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """A first turn and one answer to it, as token ids: `prompt_tokens` are the template's with the question in it."""

    question: FirstTurn
    temperature: float
    prompt_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]  # with the end token, if it was reached

    @property
    def tokens(self) -> tuple[int, ...]:
        """All of them, as the target read and wrote them."""
        return self.prompt_tokens + self.answer_tokens


def _prompt(pipe: Pipeline, text: str) -> list[int]:
    return pipe.encode([{"role": "user", "content": text}])


def user_opening(pipe: Pipeline) -> list[int]:
    """The ids that stand before whatever a user says first: a chat model that goes on from here asks a question.

    Raises `UserError` where the model has no chat template, or one that begins with the user's own text.
    """
    rendered = [_prompt(pipe, text) for text in _OPENINGS]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rendered, strict=False))
    ids = [column[0] for column in same]
    if not ids:
        raise UserError(
            f"{pipe.artifact.path}: expected a chat template that opens a user's turn with tokens of its own, got one "
            "that begins with what is said; give questions (`prompts`)"
        )
    return ids


def self_made_questions(
    pipe: Pipeline, first: int = 0, answer_tokens: int = ANSWER_TOKENS
) -> Generator[FirstTurn, None, None]:
    """Questions without end that the model makes up: given the opening of a user's turn alone, it says what a user
    would (Magpie, arXiv 2406.08464). Number n, from `first` on, is drawn with the seed n, so it is the same every time.

    What does not end within 400 tokens, leaves no room for so many of an answer, says nothing, or was said before is
    left out. Raises `UserError` where so many are in a row that none can be expected.
    """
    opening, said, useless = user_opening(pipe), set[str](), 0
    config = GenerationConfig(max_new_tokens=_QUESTION_TOKENS, temperature=1.0, top_p=0.95, top_k=0)
    requests = (Request(opening, dataclasses.replace(config, seed=number)) for number in itertools.count(first))
    for number, outcome in zip(itertools.count(first), pipe.generate_many(requests), strict=False):
        if outcome.error is not None:
            raise outcome.error
        (question,) = outcome.generations
        text = question.text.strip()
        is_new = question.finish_reason == "stop" and len(text) >= _FEWEST_CHARACTERS and text not in said
        if is_new and _can_be_answered(pipe, text, answer_tokens):
            useless = 0
            yield FirstTurn(f"{SELF_MADE}{number}", text)
        else:
            useless += 1
            if useless == _PATIENCE:
                raise UserError(
                    f"{pipe.artifact.path}: expected a model that makes up questions, got {useless} texts in a row "
                    "that are none: too long, too short, or said before; give questions (`prompts`)"
                )
        if is_new:
            said.add(text)


def _can_be_answered(pipe: Pipeline, text: str, tokens: int) -> bool:
    try:
        return len(_prompt(pipe, text)) + tokens <= pipe.ctx_size
    except UserError:  # a model may say what nobody may ask, such as a NUL character
        return False


def answers(
    pipe: Pipeline,
    questions: Iterable[tuple[FirstTurn, float]],
    max_new_tokens: int = ANSWER_TOKENS,
) -> Iterator[Exchange]:
    """The model's answer to each question at its temperature, in their order, many at a time. An answer ends at its end
    token or after `max_new_tokens`.

    Raises `ContextOverflowError` that names a question that does not fit the context with its answer.
    """
    asked: deque[tuple[FirstTurn, float, list[int]]] = deque()

    def requests() -> Iterator[Request]:
        for question, temperature in questions:
            ids = _prompt(pipe, question.text)
            if len(ids) + max_new_tokens > pipe.ctx_size:
                raise ContextOverflowError(
                    f"{question.source}: expected a question that leaves room for {max_new_tokens} tokens in the "
                    f"context of {pipe.ctx_size}, got one of {len(ids)} tokens; shorten it or leave it out"
                )
            asked.append((question, temperature, ids))
            seed = zlib.crc32(f"{question.source} {temperature}".encode())
            config = GenerationConfig(
                max_new_tokens=max_new_tokens, temperature=temperature, top_k=0, top_p=1.0, seed=seed
            )
            yield Request(ids, config)

    for outcome in pipe.generate_many(requests()):
        if outcome.error is not None:
            raise outcome.error
        question, temperature, ids = asked.popleft()
        (answer,) = outcome.generations
        yield Exchange(question, temperature, tuple(ids), tuple(answer.token_ids))


def first_turns(path: Path) -> list[FirstTurn]:
    """The first turns of the questions in a file, in any of the layouts that are read (`question_file.py`). Raises
    `UserError`.
    """
    return [FirstTurn(f"{path.name}:{question.number}", question.turns[0]) for question in read_questions(path)]
