"""Proves of every reader of untrusted bytes that it takes or refuses, as it should, what coverage-guided fuzzing found
worth keeping (tests/corpus): inputs that together go every way that the fuzzer knows, and those that once went wrong.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from untrusted_readers import READERS, complaint, kept

from dovetail.runtime.errors import UserError

CORPUS = Path(__file__).resolve().parents[1] / "corpus"


@pytest.mark.parametrize("name", READERS)
def test_kept_inputs(name: str) -> None:
    reader = READERS[name]
    inputs = [*reader.seeds(), *kept(CORPUS / f"{name}.jsonl")]
    found = [f"{data[:300]!r}: {': '.join(fault)}" for data in inputs if (fault := complaint(reader, data))]
    assert not found, f"{len(found)} of {len(inputs)}:\n" + "\n".join(found[:5])


@pytest.mark.parametrize("name", READERS)
def test_a_corpus_is_taken_and_refused(name: str) -> None:
    """What refuses all, or nothing, proves nothing."""
    reader, taken = READERS[name], set()
    for data in [*reader.seeds(), *kept(CORPUS / f"{name}.jsonl")]:
        try:
            reader.read(data)
            taken.add(True)
        except UserError:
            taken.add(False)
    assert taken == {True, False}


def test_every_corpus_has_a_reader() -> None:
    assert {path.stem for path in CORPUS.glob("*.jsonl")} == set(READERS)
