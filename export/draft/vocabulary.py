"""Which tokens a draft can say: the most frequent ones of a text. A draft's LM head is over a third of its weights, and
most of its rows are tokens that are hardly ever right (FR-Spec, arXiv 2502.14856; EAGLE-3, arXiv 2503.01840). The
target still says them all.

Letters: N tokens kept, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dovetail.export.sources.base import Source
from dovetail.export.sources.llama_shapes import INFLATION_NOTE
from dovetail.export.training import corpus
from dovetail.runtime.errors import UserError

MIN_TOKENS = 64  # the widest level of a tree


def draft_vocabulary(source: Source, size: int, texts: Sequence[Path]) -> NDArray[np.int64]:
    """The `size` tokens that are most frequent in `texts` (files and folders; none: what this interpreter's standard
    library is trained on) by the tokenizer of the checkpoint `source`.  # [N] ascending

    An inflated checkpoint has padded tokens, which no text contains: of its source's tokens, the share is kept that
    `size` is of all, so that acceptance and cost are those of a reduced vocabulary in both. Raises `UserError`.
    """
    vocab_size, _ = source.sizes()
    check_size(size, vocab_size, "draft_vocab")
    documents = (corpus.text_files(texts) if texts else corpus.standard_library()).train.values()
    counts = count_tokens(Tokenizer.from_str(source.tokenizer), documents, vocab_size)
    note = source.path / INFLATION_NOTE
    real = json.loads(note.read_text(encoding="utf-8"))["source_shape"]["vocab_size"] if note.is_file() else vocab_size
    real_size = max(MIN_TOKENS, round(size * real / vocab_size))
    return np.concatenate([most_frequent(counts[:real], real_size), np.arange(real, real + size - real_size)])


def check_size(size: int, vocab_size: int, name: str) -> None:
    """Raise `UserError` unless a tree can be as wide as `size` and the target has as many tokens."""
    if not MIN_TOKENS <= size <= vocab_size:
        raise UserError(
            f"expected `{name}` from {MIN_TOKENS} to the vocabulary's {vocab_size}, got {size}; choose another"
        )


def count_tokens(tokenizer: Tokenizer, documents: Iterable[str], vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs.  # [V]"""
    ids = corpus.encode(tokenizer, list(documents))
    return np.bincount(ids, minlength=vocab_size)


def most_frequent(counts: NDArray[Any], size: int) -> NDArray[np.int64]:
    """The `size` tokens with the highest counts, of equals the lowest (in a BPE the earlier merge).  # [N] ascending"""
    return np.sort(np.argsort(-counts, kind="stable")[:size])
