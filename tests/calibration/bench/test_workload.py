"""Proves that a benchmark asks held-out text only, the same every time and cut to the model's context, that the usual
question files load as they are, and that the memory's speed is measured over what no cache holds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.calibration.bench.bandwidth import measure_bandwidth
from dovetail.calibration.bench.workload import (
    COMPLETE,
    EDIT,
    LONG,
    Sizes,
    file_prompts,
    growth_prompts,
    standard_prompts,
)
from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.standard_library import held_out_files, is_held_out


def encode(text: str) -> list[int]:
    """A token per character, behind a start token."""
    return [0, *map(ord, text)]


def test_prompts_are_held_out_and_the_same_every_time() -> None:
    prompts = standard_prompts(encode, Sizes(3, 2, 1), 4000)
    assert prompts == standard_prompts(encode, Sizes(3, 2, 1), 4000)
    assert [prompt.category for prompt in prompts] == [COMPLETE] * 3 + [EDIT] * 2 + [LONG]
    files = dict(held_out_files())
    for prompt in prompts:
        name = prompt.source.split(":")[0]
        assert is_held_out(name)
        assert name in files
        text = "".join(map(chr, prompt.ids[1:]))
        if prompt.category == COMPLETE:
            assert text.startswith("def ")
            assert text.rstrip().endswith(('"""', "'''", '"'))
            assert text.splitlines()[0].strip() in files[name]
        if prompt.category == EDIT:
            assert "# The same function, renamed to" in text
            assert text.rstrip().endswith(":")
        assert prompt.ids[0] == 0


def test_prompts_are_cut_at_their_front() -> None:
    whole = standard_prompts(encode, Sizes(1, 1, 1), 4000)
    cut = standard_prompts(encode, Sizes(1, 1, 1), 100)
    for long, short in zip(whole, cut, strict=True):
        assert len(short.ids) == min(100, len(long.ids))
        assert short.ids[0] == 0
        assert short.ids[1:] == long.ids[len(long.ids) - len(short.ids) + 1 :]


def test_growth_fits_the_context() -> None:
    assert [len(prompt.ids) for prompt in growth_prompts(encode, 1200)] == [200, 500, 1000]


@pytest.mark.parametrize(
    ("line", "layout", "text", "is_said"),
    [
        (
            '{"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}',
            "mt-bench",
            "Write.",
            True,
        ),
        (
            '{"task_id": "t/0", "prompt": "def f():", "entry_point": "f", "test": ""}',
            "humaneval",
            "def f():",
            False,
        ),
        ('{"question": "How many?", "answer": "#### 2"}', "gsm8k", "How many?", True),
        ('{"instruction": "Sort.", "input": "3 1", "output": "1 3"}', "alpaca", "Sort.\n\n3 1", True),
        ('{"instruction": "Sing.", "input": "", "output": ""}', "alpaca", "Sing.", True),
        ('{"prompt": "Once"}', "prompt", "Once", False),
    ],
)
def test_question_files_load_as_they_are(line: str, layout: str, text: str, is_said: bool, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f"\n{line}\n\n")
    seen = []

    def tell(text: str, is_said: bool) -> list[int]:
        seen.append((text, is_said))
        return encode(text)

    (prompt,) = file_prompts(path, tell, None, 1000)
    assert (prompt.category, prompt.source) == (layout, "questions.jsonl:2")
    assert seen == [(text, is_said)]


def test_some_of_a_file_are_spread_evenly(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(100)))
    chosen = file_prompts(path, lambda text, _: encode(text), 4, 1000)
    assert [prompt.source for prompt in chosen] == [f"questions.jsonl:{n}" for n in (1, 26, 51, 76)]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ('{"prompt": "x"}\n{"text": "y", "id": 1}', r"line 2: expected the keys .*, got id, text"),
        ('{"prompt": "x"', r"line 1: expected one strict JSON document"),
        ('["x"]', r"line 1: expected an object"),
        ('{"prompt": "  "}', r"line 1: expected the keys .* with text"),
        ('{"turns": [1]}', r"line 1: expected the keys"),
        ("\n\n", "got an empty file"),
    ],
)
def test_other_layouts_are_one_line(data: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(data)
    with pytest.raises(UserError, match=line) as error:
        file_prompts(path, lambda text, _: encode(text), None, 1000)
    assert "\n" not in str(error.value)


def test_memory_bandwidth() -> None:
    found = measure_bandwidth(2, array_bytes=64 << 20, repeats=2)
    assert found.array_bytes == 64 << 20
    assert 0.1 < found.gb_per_s < 5000
    assert found.kernel
