"""Text -> tokens: the interpreter's standard library as a corpus (or the user's files), held-out split, tokenizer,
token arrays.

Letters: N tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.standard_library import (
    held_out_files,
    is_held_out,
    path_hash,
    read_text,
    standard_library_names,
    standard_library_root,
)

END_OF_TEXT = "<|endoftext|>"  # token id 0: in front of every document, and what a model ends with
_MIN_CHARACTERS = 200
_LONG_LINE = 120  # characters on average: prose, or a table of data
_FEWEST_LETTERS = 0.6  # share of letters and blanks in prose
_LONGEST_WORD = 40  # characters between blanks on average: encoded data, or a script that writes no blanks


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Documents by path (relative to the corpus root), disjoint by path and by content."""

    train: dict[str, str]
    held_out: dict[str, str]

    def __post_init__(self) -> None:
        if not self.train or not self.held_out:
            raise UserError(
                f"expected text for training and for the held-out check, got {len(self.train)} and "
                f"{len(self.held_out)} documents; "
                "give more or longer text files"
            )


def split(documents: Iterable[tuple[str, str]]) -> Corpus:
    """(path, text) pairs -> corpus. Repeated contents and data tables are left out; the order of the pairs decides
    which copy stays.
    """
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    seen: set[bytes] = set()
    for path, text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < _MIN_CHARACTERS or _is_data(text) or digest in seen:
            continue
        seen.add(digest)
        (held_out if is_held_out(path) else train)[path] = text
    if not held_out and len(train) > 1:  # so few documents that the hash chose none
        smallest = min(train, key=path_hash)
        held_out[smallest] = train.pop(smallest)
    return Corpus(train, held_out)


def _is_data(text: str) -> bool:
    """Whether these are numbers or encoded bytes in long lines, and not what somebody wrote to be read."""
    if len(text) / max(1, text.count("\n")) <= _LONG_LINE:
        return False
    blanks = sum(map(str.isspace, text))
    letters = sum(map(str.isalpha, text))
    has_no_words = text.isascii() and len(text) / (blanks + 1) > _LONGEST_WORD
    return has_no_words or letters + blanks < _FEWEST_LETTERS * len(text)


def standard_library() -> Corpus:
    """Every Python file of the running interpreter's own standard library (PSF licence), de-duplicated.

    Without code pages and the broken inputs of its tests.
    """
    root = standard_library_root()
    return split((name, read_text(root / name)) for name in standard_library_names())


def held_out_samples() -> Iterator[str]:
    """The texts of the held-out files of the standard library, without reading the others."""
    return (text for _, text in held_out_files())


def text_files(paths: Sequence[Path], chunk_characters: int = 20_000) -> Corpus:
    """The user's text: files, and all files below folders. Long files are cut into documents, so that even one file has
    a held-out part.
    """
    documents = []
    for root in paths:
        if not root.exists():
            raise UserError(
                f"expected a text file or a folder of text files, got {root}, which does not exist; check `text`"
            )
        for path in sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]:
            text = read_text(path)
            for start in range(0, len(text), chunk_characters):
                documents.append((f"{path.name}:{start}", text[start : start + chunk_characters]))
    return split(documents)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """A byte-level BPE with `END_OF_TEXT` as token 0, put in front of every encoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_document_start(tokenizer)


def with_document_start(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, ids unchanged, whose post-processor puts `END_OF_TEXT` in front."""
    token_id = tokenizer.token_to_id(END_OF_TEXT)
    if token_id is None:
        raise UserError(
            f"expected a tokenizer with the token {END_OF_TEXT}, got one without it; start from a checkpoint of this "
            f"command"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, token_id)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int32]:
    """All texts one after the other, each as the tokenizer encodes a prompt.  # [N] int32"""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    return np.concatenate([np.asarray(i, np.int32) for i in ids])


def bytes_per_token(texts: Iterable[str], num_tokens: int) -> float:
    """UTF-8 bytes of the texts over their tokens, document starts counted as tokens."""
    return sum(len(text.encode()) for text in texts) / num_tokens
