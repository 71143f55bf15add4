"""Proves that a benchmark asks held-out text only, the same every time and cut to the model's context, that a file's
questions keep their categories, and that the memory's speed is measured over what no cache holds.
"""

from __future__ import annotations

from pathlib import Path

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


def test_questions_have_their_category_or_else_their_layout(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('\n{"turns": ["Hi."], "category": "writing"}\n{"question": "How many?"}\n{"prompt": "Once"}\n')
    seen = []

    def tell(text: str, is_said: bool) -> list[int]:
        seen.append((text, is_said))
        return encode(text)

    prompts = file_prompts(path, tell, None, 1000)
    assert [(prompt.category, prompt.source) for prompt in prompts] == [
        ("writing", "questions.jsonl:2"),
        ("gsm8k", "questions.jsonl:3"),
        ("prompt", "questions.jsonl:4"),
    ]
    assert seen == [("Hi.", True), ("How many?", True), ("Once", False)]


def test_some_of_a_file_are_spread_evenly(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(100)))
    chosen = file_prompts(path, lambda text, _: encode(text), 4, 1000)
    assert [prompt.source for prompt in chosen] == [f"questions.jsonl:{n}" for n in (1, 26, 51, 76)]


def test_memory_bandwidth() -> None:
    found = measure_bandwidth(2, array_bytes=64 << 20, repeats=2)
    assert found.array_bytes == 64 << 20
    assert 0.1 < found.gb_per_s < 5000
    assert found.kernel
