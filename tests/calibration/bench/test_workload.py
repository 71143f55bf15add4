"""Proves that a benchmark asks held-out text only, the same every time and cut to the model's context, and that the
memory's speed is measured over what no cache holds.
"""

from __future__ import annotations

from dovetail.calibration.bench.bandwidth import measure_bandwidth
from dovetail.calibration.bench.workload import (
    COMPLETE,
    EDIT,
    LONG,
    Sizes,
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


def test_memory_bandwidth() -> None:
    found = measure_bandwidth(2, array_bytes=64 << 20, repeats=2)
    assert found.array_bytes == 64 << 20
    assert 0.1 < found.gb_per_s < 5000
    assert found.kernel
