"""Text -> tokens: the interpreter's standard library as a corpus (or the user's files), held-out split, tokenizer,
token arrays.

Letters: N tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from dovetail.runtime.errors import UserError
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"  # token id 0: in front of every document, and what a model ends with
HELD_OUT_ONE_IN = 40
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_MIN_CHARACTERS = 200
_MAX_LINE_MEAN = 120  # longer lines on average: tables of data, not code


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


def is_held_out(path: str) -> bool:
    """The split: a file is held out or not by the hash of its path, whatever else is in the corpus."""
    return _path_hash(path) % HELD_OUT_ONE_IN == 0


def _path_hash(path: str) -> int:
    return int(hashlib.sha256(path.encode()).hexdigest(), 16)


def split(documents: Iterable[tuple[str, str]]) -> Corpus:
    """(path, text) pairs -> corpus. Repeated contents and data tables are left out; the order of the pairs decides
    which copy stays.
    """
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    seen: set[bytes] = set()
    for path, text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        is_table = len(text) / max(1, text.count("\n")) > _MAX_LINE_MEAN
        if len(text) < _MIN_CHARACTERS or is_table or digest in seen:
            continue
        seen.add(digest)
        (held_out if is_held_out(path) else train)[path] = text
    if not held_out and len(train) > 1:  # so few documents that the hash chose none
        chosen = min(train, key=_path_hash)
        held_out[chosen] = train.pop(chosen)
    return Corpus(train, held_out)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _standard_library_names() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        parts = set(Path(name).parts[:-1])
        is_code_page = name.startswith("encodings/cp")
        if parts & _SKIPPED_FOLDERS or is_code_page or name.startswith("lib2to3/tests/data") or "/bad" in "/" + name:
            continue
        names.append(name)
    return names


def standard_library() -> Corpus:
    """Every Python file of the running interpreter's own standard library (PSF licence), de-duplicated.

    Without code pages and the broken inputs of its tests.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return split((name, _read_text(root / name)) for name in _standard_library_names())


def held_out_samples() -> Iterator[str]:
    """The held-out files of the standard library one by one, without reading the others."""
    root = Path(sysconfig.get_path("stdlib"))
    return (text for name in _standard_library_names() if is_held_out(name) and (text := _read_text(root / name)))


def text_files(paths: Sequence[Path], chunk_characters: int = 20_000) -> Corpus:
    """The user's text: files, and all files below folders. Long files are cut into documents, so that even one file has
    a held-out part.
    """
    documents = []
    for given in paths:
        if not given.exists():
            raise UserError(
                f"expected a text file or a folder of text files, got {given}, which does not exist; check --text"
            )
        for path in sorted(p for p in given.rglob("*") if p.is_file()) if given.is_dir() else [given]:
            text = _read_text(path)
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
