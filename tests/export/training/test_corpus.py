"""Proves that the corpus split is the same every time and keeps held-out text out of training, and that the tokenizer
gives every byte back and marks the start of a document.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.export.training import corpus
from dovetail.export.training.loop import Windows
from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.standard_library import HELD_OUT_ONE_IN, is_held_out


@pytest.fixture(scope="module")
def library() -> corpus.Corpus:
    return corpus.standard_library()


def test_split_is_deterministic_and_disjoint(library: corpus.Corpus) -> None:
    assert not set(library.train) & set(library.held_out)
    assert not set(library.train.values()) & set(library.held_out.values()), "one text on both sides"
    assert len(set(library.train.values())) == len(library.train), "the same text twice"
    assert all(is_held_out(name) for name in library.held_out)
    assert 0.4 < len(library.held_out) * HELD_OUT_ONE_IN / (len(library.train) + len(library.held_out)) < 2.5
    assert not any("site-packages" in name for name in library.train)
    assert set(library.held_out.values()) <= set(corpus.held_out_samples())


def test_the_split_does_not_depend_on_the_other_files() -> None:
    documents = [(f"{i}.py", f"print({i})\n" * 40) for i in range(400)]
    whole, half = corpus.split(documents), corpus.split(documents[::2])
    assert set(half.held_out) == {name for name in whole.held_out if int(name[:-3]) % 2 == 0}


def test_the_users_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "long.txt").write_text("".join(f"line {i} of a long text\n" for i in range(100_000)))
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00" * 1000)
    found = corpus.text_files([tmp_path])
    assert {name.split(":")[0] for name in (*found.train, *found.held_out)} == {"long.txt"}
    with pytest.raises(UserError, match="does not exist"):
        corpus.text_files([tmp_path / "nothing"])
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="held-out"):
        corpus.text_files([tmp_path / "short.txt"])


def test_tokenizer(library: corpus.Corpus) -> None:
    texts = list(library.held_out.values())[:4]
    tokenizer = corpus.train_tokenizer(texts, 600)
    assert tokenizer.token_to_id(corpus.END_OF_TEXT) == 0
    for text in (*texts, "", "\x00 Grüße, 世界 🌍\r\n"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0
        assert tokenizer.decode(ids[1:]) == text
    stream = corpus.encode(tokenizer, texts)
    assert stream.dtype == np.int32
    assert (stream == 0).sum() == len(texts)
    bare = corpus.train_tokenizer(texts, 600)
    bare.post_processor = None  # type: ignore[assignment]  # how the checkpoint that we start from stores it
    assert corpus.with_document_start(bare).encode(texts[0]).ids == tokenizer.encode(texts[0]).ids


@given(st.integers(50, 400), st.integers(1, 20), st.integers(1, 6), st.integers(0, 100))
def test_windows_cover_an_epoch_once_and_resume(size: int, length: int, count: int, seed: int) -> None:
    tokens = np.arange(size, dtype=np.int32)
    if (size - length - 1) // length < count:
        return
    windows, seen = Windows(tokens, seed), []
    state = windows.state_dict()
    for _ in range(5):
        resumed = Windows(tokens, seed + 1)
        resumed.load_state_dict(state)
        starts, rows = windows.next(count, length)
        np.testing.assert_array_equal(resumed.next(count, length)[1], rows)
        state = windows.state_dict()
        assert rows.shape == (count, length + 1)
        np.testing.assert_array_equal(rows, starts[:, None] + np.arange(length + 1))
        if state["epoch"] == 0:
            seen += starts.tolist()
    assert len(set(seen)) == len(seen)


def test_too_little_text_is_the_users() -> None:
    with pytest.raises(UserError, match="give more text"):
        Windows(np.arange(30, dtype=np.int32), 0).next(4, 16)
