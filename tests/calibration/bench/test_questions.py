"""Proves that the questions of a file are spread over their categories, that conversations are played to their last
turn with the same answers for every runner, and that an answer is as long as the reference's own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from models.chat_families import FAMILIES, chat_artifact

from dovetail.calibration.bench.questions import FEWEST_TOKENS, choose_questions, plain_answer, question_prompts
from dovetail.calibration.commands.prompts import asked_prompts
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.batch.question_file import Question
from dovetail.runtime.errors import UserError
from dovetail.runtime.text.tokenizer import load_tokenizer


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def encode(question: Question, answers: Sequence[str]) -> list[int]:
    """A token per character of what was said so far, behind a start token."""
    said = [text for pair in zip(question.turns, [*answers, ""], strict=False) for text in pair]
    return [0, *map(ord, "|".join(said))]


def test_some_of_a_file_are_spread_over_its_categories(tmp_path: Path) -> None:
    sizes = {"writing": 3, "qa": 80, "math": 80}
    names = [name for name, size in sizes.items() for _ in range(size)]
    path = write(tmp_path / "q.jsonl", *({"question": "x", "category": name} for name in names))
    chosen = choose_questions(path, 13)
    assert Counter(question.category for question in chosen) == {"writing": 3, "qa": 5, "math": 5}
    assert [question.number for question in chosen][3:8] == [4, 20, 36, 52, 68]
    assert [question.number for question in choose_questions(path, 2)] == [1, 4]
    assert len(choose_questions(path, None)) == len(choose_questions(path, 1000)) == 163


def test_a_question_without_a_category_has_its_layout(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"turns": ["Hi."], "category": "writing"}, {"question": "?"}, {"prompt": "Once"})
    prompts = list(question_prompts("q.jsonl", choose_questions(path, None), encode, 1000))
    assert [(prompt.category, prompt.source) for prompt in prompts] == [
        ("writing", "q.jsonl:1"),
        ("gsm8k", "q.jsonl:2"),
        ("prompt", "q.jsonl:3"),
    ]


def test_categories_that_the_report_uses_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "x"}, {"question": "y", "category": "mean"})
    with pytest.raises(UserError, match="line 2: expected another category than 'mean'"):
        choose_questions(path, None)


def test_all_turns_are_played() -> None:
    questions = [
        Question(4, "mt-bench", ("One?", "Two?", "Three?"), "writing", True),
        Question(5, "prompt", ("Once",), None, False),
    ]
    asked = []

    def answer(ids: list[int]) -> tuple[str, int]:
        asked.append("".join(map(chr, ids[1:])))
        return f"A{len(asked)}", 20 + len(asked)

    prompts = list(question_prompts("q", questions, encode, 1000, answer))
    assert asked == ["One?|", "One?|A1|Two?|", "One?|A1|Two?|A2|Three?|"]
    assert ["".join(map(chr, prompt.ids[1:])) for prompt in prompts] == [*asked, "Once|"]
    assert [prompt.source for prompt in prompts] == ["q:4", "q:4, turn 2", "q:4, turn 3", "q:5"]
    assert [prompt.num_tokens for prompt in prompts] == [21, 22, 23, None]
    first = list(question_prompts("q", questions, encode, 4))
    assert [(prompt.source, len(prompt.ids), prompt.num_tokens) for prompt in first] == [
        ("q:4", 4, None),
        ("q:5", 4, None),
    ]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """With a chat template and an end of text."""
    return chat_artifact(FAMILIES["chatml"], tmp_path_factory.mktemp("chat") / "artifact", eos_token_id=3)


class FakeReference:
    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    def ask(self, do: str, *, ids: list[int], max_new_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        assert (do, temperature) == ("run", 0.0)
        return {"token_ids": self._token_ids[:max_new_tokens]}

    def close(self) -> None:
        pass


def test_an_answer_ends_where_its_text_ends(artifact: Artifact) -> None:
    tokenizer = load_tokenizer(artifact)
    (end,) = tokenizer.eos_token_ids
    words = tokenizer.encode("Hello there", add_special_tokens=False)
    text = tokenizer.decode(words)

    def answered(made: list[int], tokens: int = 400) -> tuple[str, int]:
        reference: Any = FakeReference(made)
        return plain_answer(reference, tokenizer, tokens)([1])

    long = words * FEWEST_TOKENS
    assert answered([*long, end, *words]) == (tokenizer.decode(long), len(long) + 1)
    assert answered([*words, end, *words * 40]) == (text, FEWEST_TOKENS)
    assert answered([*words, end, *words * 40], tokens=5) == (tokenizer.decode(words[:5]), 5)
    assert answered(words * 40)[1] == len(words * 40)


def test_the_history_of_a_turn_is_read_by_the_chat_template(artifact: Artifact, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(artifact)
    said = tokenizer.encode("Hello", add_special_tokens=False)
    path = write(tmp_path / "q.jsonl", {"turns": ["One?", "Two?"]}, {"prompt": "Once"})
    reference: Any = FakeReference([*said, *tokenizer.eos_token_ids])
    prompts = asked_prompts(artifact, path, None, is_quick=False, tokens=8, open_plain=lambda: reference)
    texts = [tokenizer.decode(prompt.ids, skip_special_tokens=False) for prompt in prompts]
    assert len(prompts) == 3
    assert "One?" in texts[0]
    assert "Hello" not in texts[0]
    assert texts[1].index("One?") < texts[1].index("Hello") < texts[1].index("Two?")
    assert prompts[2].ids == tokenizer.encode("Once")
    first = asked_prompts(artifact, path, None, is_quick=False, tokens=8)
    assert [prompt.ids for prompt in first] == [prompts[0].ids, prompts[2].ids]
