"""What `dovetail bench` asks, by its flags."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from dovetail.calibration.bench.questions import choose_questions, plain_answer, question_prompts
from dovetail.calibration.bench.runner_process import Child, RunnerError
from dovetail.calibration.bench.schedule import GROWTH_TOKENS
from dovetail.calibration.bench.workload import QUICK, Prompt, Sizes, growth_prompts, standard_prompts
from dovetail.runtime.artifact.manifest import CHAT_TEMPLATE
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.batch.question_file import Question
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.progress import stage
from dovetail.runtime.text.chat_format import ChatFormat
from dovetail.runtime.text.tokenizer import Tokenizer, load_tokenizer

_QUICK_QUESTIONS = 4


def asked_prompts(
    artifact: Artifact,
    file: Path | None,
    count: int | None,
    *,
    is_quick: bool,
    tokens: int,
    open_plain: Callable[[], Child] | None = None,
) -> list[Prompt]:
    """Held-out code, or `count` questions of a `file`: all turns of them where `open_plain` loads a runner that answers
    the first ones, else the first. Raises `UserError`.
    """
    tokenizer = load_tokenizer(artifact)
    room = artifact.manifest.target.context_length - tokens
    if file is None:
        if count is not None:
            raise UserError("--num-prompts: expected it with --prompts, got it alone; drop it, or use --quick")
        return standard_prompts(tokenizer.encode, QUICK if is_quick else Sizes(), room)
    questions = choose_questions(file, count or (_QUICK_QUESTIONS if is_quick else None))

    def as_text(question: Question, answers: Sequence[str]) -> list[int]:
        return tokenizer.encode(question.turns[0])

    if not artifact.has(CHAT_TEMPLATE) or not any(question.is_said for question in questions):
        return list(question_prompts(file.name, questions, as_text, room))
    with contextlib.closing(ChatFormat(artifact, tokenizer)) as chat:

        def encode(question: Question, answers: Sequence[str]) -> list[int]:
            if not question.is_said:
                return as_text(question, answers)
            messages = [{"role": "user", "content": question.turns[0]}]
            for said, turn in zip(
                answers, question.turns[1:], strict=False
            ):  # what is not yet answered is not yet said
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": turn}]
            return chat.encode(messages)

        if open_plain is None:
            return list(question_prompts(file.name, questions, encode, room))
        return _answered(file.name, questions, encode, room, tokenizer, tokens, open_plain)


def _answered(
    name: str,
    questions: Sequence[Question],
    encode: Callable[[Question, Sequence[str]], list[int]],
    room: int,
    tokenizer: Tokenizer,
    tokens: int,
    open_plain: Callable[[], Child],
) -> list[Prompt]:
    prompts: list[Prompt] = []
    total = sum(len(question.turns) for question in questions)
    try:
        with contextlib.closing(open_plain()) as plain, stage("plain decoding's answers") as bar:
            answer = plain_answer(plain, tokenizer, tokens)
            for prompt in question_prompts(name, questions, encode, room, answer):
                prompts.append(prompt)
                bar.update(len(prompts) / total, f"{len(prompts)} of {total}")
    except RunnerError as error:
        raise UserError(f"expected plain decoding to answer the questions, got: {error}") from None
    return prompts


def growing_prompts(artifact: Artifact, tokens: int) -> list[Prompt]:
    """Contexts of growing length, for texts of up to `tokens`."""
    room = artifact.manifest.target.context_length - min(tokens, GROWTH_TOKENS)
    return growth_prompts(load_tokenizer(artifact).encode, room)
