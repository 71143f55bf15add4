"""Proves of every reader of untrusted bytes that it takes or refuses, as it should, what coverage-guided fuzzing found
worth keeping (tests/corpus): inputs that together go every way that the fuzzer knows, and those that once went wrong.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from untrusted_readers import READERS, judged, kept

CORPUS = Path(__file__).resolve().parents[1] / "corpus"


@pytest.mark.parametrize("name", READERS)
def test_kept_inputs(name: str) -> None:
    reader = READERS[name]
    inputs = [*reader.seeds(), *kept(CORPUS / f"{name}.jsonl")]
    verdicts = [(data, *judged(reader, data)) for data in inputs]
    found = [f"{data[:300]!r}: {': '.join(fault)}" for data, _, fault in verdicts if fault]
    assert not found, f"{len(found)} of {len(inputs)}:\n" + "\n".join(found[:5])
    assert {taken for _, taken, _ in verdicts} == {True, False}, "what is all taken, or all refused, proves nothing"


def test_every_corpus_has_a_reader() -> None:
    assert {path.stem for path in CORPUS.glob("*.jsonl")} == set(READERS)
