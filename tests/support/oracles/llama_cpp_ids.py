"""llama.cpp's ids for the varied lines, as digests of 200 lines each: of the files as they are, and of the same
vocabularies with other metadata, so that ways to split words are proven for which we have no model.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from texts.varied_lines import varied_lines
from tokenizers import Tokenizer

from dovetail.export.sources.gguf_format import read_gguf_file
from dovetail.export.sources.gguf_metadata import Metadata
from dovetail.export.tokenizers.from_gguf import read_gguf_tokenizer
from dovetail.export.tokenizers.pre_tokenizers import PRE_TOKENIZERS

AS_IT_IS, AS_TEXT = "as it is", "control tokens as text"
COUNT, _VARIANT_COUNT, _LINES = 24_000, 4_000, 200


def variants(model: str) -> Mapping[str, Mapping[str, Any]]:
    """Name -> the metadata that is another."""
    plain: dict[str, Mapping[str, Any]] = {AS_IT_IS: {}, AS_TEXT: {}}
    if model == "gemma3":
        return plain | {"space in front": {"tokenizer.ggml.add_space_prefix": True}}
    distinct = {kind: name for name, kind in PRE_TOKENIZERS.items()}
    return plain | {name: {"tokenizer.ggml.pre": name} for name in distinct.values()}


def tokenizer_of(gguf: Path, model: str, variant: str) -> Tokenizer:
    """Ours, of a file with some metadata changed."""
    values = dict(read_gguf_file(gguf).values) | variants(model)[variant]
    tokenizer = Tokenizer.from_str(read_gguf_tokenizer(Metadata(values, gguf)).text)
    tokenizer.encode_special_tokens = variant == AS_TEXT
    return tokenizer


def lines_for(tokenizer: Tokenizer, variant: str) -> list[str]:
    """The varied lines, with tokens of its vocabulary among them; composed, where the tokenizer does that first, which
    llama.cpp leaves out.
    """
    texts = (
        text.replace("\0", "") for text in tokenizer.decode_batch([[i] for i in range(tokenizer.get_vocab_size())])
    )
    pieces = [text for text in texts if text and "\ufffd" not in text]
    added = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    count = COUNT if variant == AS_IT_IS else _VARIANT_COUNT
    lines = varied_lines(count, added[:: max(1, len(added) // 40)], pieces)
    composes = type(tokenizer.normalizer).__name__ == "NFC"
    return [tokenizer.normalizer.normalize_str(line) for line in lines] if composes else lines


def digests(ids: Sequence[Sequence[int]]) -> list[str]:
    """One digest for every 200 lines of ids."""
    rows = [struct.pack(f"<{len(row) + 1}i", len(row), *row) for row in ids]
    blocks = [b"".join(rows[i : i + _LINES]) for i in range(0, len(rows), _LINES)]
    return [hashlib.sha256(block).hexdigest()[:16] for block in blocks]


def differing_lines(ours: Sequence[str], theirs: Sequence[str]) -> list[range]:
    """The lines behind the digests that differ."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return [range(_LINES * i, _LINES * (i + 1)) for i, (one, other) in pairs if one != other]
