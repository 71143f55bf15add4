"""The questions of a user's file as prompts: some of every category, each conversation to its last turn.

What a person says next only makes sense behind an answer. So that all runners do the same work, they are given the same
one: what plain decoding answers greedily, asked before anything is timed. Where that answer ends, every runner's does:
text behind an end is no real text, and easy to draft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dovetail.calibration.bench.runner_process import Child
from dovetail.calibration.bench.workload import OWN_NAMES, Prompt, cut, spread
from dovetail.runtime.batch.question_file import Question, read_questions
from dovetail.runtime.errors import UserError
from dovetail.runtime.text.tokenizer import Tokenizer

FEWEST_TOKENS = 16  # an answer that ends before goes on behind its end: there must be something to time

Encode = Callable[[Question, Sequence[str]], list[int]]
"""(question, what was answered to its first turns) -> token ids up to where the next answer begins."""
Answer = Callable[[list[int]], tuple[str, int]]
"""Token ids -> (what is answered, how many tokens that are)."""


def choose_questions(path: Path, count: int | None) -> list[Question]:
    """`some_of_each` of a file, or all. Raises `UserError` naming the line that is something else."""
    questions = read_questions(path)
    for question in questions:
        if (name := category_of(question)) in OWN_NAMES:
            raise UserError(
                f"{path}, line {question.number}: expected another category than {name!r}, which names a row of the "
                "report; rename it"
            )
    return some_of_each(questions, count or len(questions))


def some_of_each(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` of them, or all: equally many of each category, evenly spread in it, in their order."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(category_of(question), []).append(question)
    left, shares = min(count, len(questions)), dict.fromkeys(groups, 0)
    while left:  # a question of each category in turn: what a small one has not, the others give
        for name, group in groups.items():
            if left and shares[name] < len(group):
                shares[name], left = shares[name] + 1, left - 1
    chosen = [question for name, group in groups.items() for question in spread(group, shares[name])]
    return sorted(chosen, key=lambda question: question.number)


def category_of(question: Question) -> str:
    """Its own, or else what its layout says."""
    return question.category or question.layout


def question_prompts(
    file: str, questions: Sequence[Question], encode: Encode, room: int, answer: Answer | None = None
) -> Iterator[Prompt]:
    """A prompt a turn, each cut at its front to `room` tokens; without an `answer` only of the first turns. A text that
    nobody says is a prompt as it is.
    """
    for question in questions:
        is_answered = answer is not None and question.is_said
        answers: list[str] = []
        for turn in range(len(question.turns) if is_answered else 1):
            ids = cut(encode(question, answers), room)
            num_tokens = None
            if answer is not None and is_answered:
                text, num_tokens = answer(ids)
                answers.append(text)
            source = f"{file}:{question.number}" + (f", turn {turn + 1}" if turn else "")
            yield Prompt(category_of(question), source, ids, num_tokens)


def plain_answer(reference: Child, tokenizer: Tokenizer, tokens: int) -> Answer:
    """What the loaded runner `reference` answers greedily in up to `tokens` tokens, up to the end of the text."""

    def answer(ids: list[int]) -> tuple[str, int]:
        made: list[int] = reference.ask("run", ids=ids, max_new_tokens=tokens, temperature=0.0, seed=0)["token_ids"]
        end = next((i for i, token in enumerate(made) if token in tokenizer.eos_token_ids), len(made))
        return tokenizer.decode(made[:end]), min(tokens, max(end + 1, FEWEST_TOKENS))

    return answer
