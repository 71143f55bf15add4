"""Proves that the files of questions that benchmarks and instruction sets publish are read as they are, with all turns
and the category of a line, and that anything else is refused in one line that names the file and the line.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.runtime.batch.question_file import Question, read_questions
from dovetail.runtime.errors import UserError

SEED_TASK = (
    '{"id": "seed_task_1", "instruction": "Name the relation.", "instances": [{"input": "Night : Day", "output": ""}'
)


@pytest.mark.parametrize(
    ("line", "layout", "turns", "category", "is_said"),
    [
        (
            '{"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}',
            "mt-bench",
            ("Write.", "Again."),
            "writing",
            True,
        ),
        ('{"turns": ["Write."], "category": " "}', "mt-bench", ("Write.",), None, True),
        (
            '{"task_id": "t/0", "prompt": "def f():", "entry_point": "f", "test": ""}',
            "humaneval",
            ("def f():",),
            None,
            False,
        ),
        ('{"question": "How many?", "answer": "#### 2"}', "gsm8k", ("How many?",), None, True),
        ('{"instruction": "Sort.", "input": "3 1", "output": "1 3"}', "alpaca", ("Sort.\n\n3 1",), None, True),
        ('{"instruction": "Sing.", "input": "", "output": ""}', "alpaca", ("Sing.",), None, True),
        (SEED_TASK + "]}", "self-instruct", ("Name the relation.\n\nNight : Day",), None, True),
        (SEED_TASK + ', {"input": "x"}]}', "self-instruct", ("Name the relation.\n\nNight : Day",), None, True),
        ('{"instruction": "Sing.", "instances": []}', "self-instruct", ("Sing.",), None, True),
        ('{"prompt": "Once", "category": "tale"}', "prompt", ("Once",), "tale", False),
    ],
)
def test_published_files_are_read_as_they_are(
    line: str, layout: str, turns: tuple[str, ...], category: str | None, is_said: bool, tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f"\ufeff\n{line}\n\n", encoding="utf-8")
    assert read_questions(path) == [Question(2, layout, turns, category, is_said)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"prompt": "x"}\n{"text": "y", "id": 1}', r"line 2: expected the keys .*, got \['id', 'text'\]"),
        ('{"prompt": "x"', r"line 1: expected one strict JSON document"),
        ('["x"]', r"line 1: expected an object"),
        ('{"prompt": "  "}', r"line 1: expected the keys .* with text"),
        ('{"turns": [1]}', r"line 1: expected the keys"),
        ('{"turns": ["x", ""]}', r"line 1: expected the keys"),
        ("\n\n", "got an empty file"),
    ],
)
def test_what_is_no_question_is_one_line(data: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(data)
    with pytest.raises(UserError, match=f"^{path}.*{message}") as error:
        read_questions(path)
    assert "\n" not in str(error.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nowhere", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=message):
            read_questions(path)
