"""Proves that the tokenizers which we make of GGUF files read texts as llama.cpp does, id by id: 24,000 varied lines of
each of two real models, and 4,000 of every known way to split words. llama.cpp's ids are kept as digests, which
tests/tools/tokenize_with_llama_cpp.py made of the same files. And that metadata which makes no tokenizer is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.llama_cpp_ids import differing_lines, digests, lines_for, tokenizer_of, variants
from real_models import gemma3_gguf, smollm2_gguf
from tokenizers import Tokenizer

from dovetail.export.sources.gguf_metadata import Metadata
from dovetail.export.tokenizers.from_gguf import read_gguf_tokenizer
from dovetail.runtime.errors import UserError
from dovetail.runtime.text.tokenizer import read_native

KEPT = {
    path.stem: json.loads(path.read_text())["digests"] for path in (Path(__file__).parent / "llama_cpp").glob("*.json")
}


def check_against_llama_cpp(gguf: Path, model: str, variant: str) -> None:
    tokenizer = tokenizer_of(gguf, model, variant)
    ids = [row.ids for row in tokenizer.encode_batch(lines_for(tokenizer, variant), add_special_tokens=False)]
    assert differing_lines(digests(ids), KEPT[model][variant]) == []


@pytest.mark.parametrize("variant", variants("smollm2"))
def test_smollm2_reads_texts_as_llama_cpp_does(variant: str) -> None:
    check_against_llama_cpp(smollm2_gguf(), "smollm2", variant)


@pytest.mark.gemma
@pytest.mark.parametrize("variant", variants("gemma3"))
def test_gemma_3_reads_texts_as_llama_cpp_does(variant: str) -> None:
    check_against_llama_cpp(gemma3_gguf(), "gemma3", variant)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["\u2581", "a", "b", "ab", "abab", "\u2581a", "\u2581ab", "xyz"]


def sentence_pieces(**changes: Any) -> dict[str, Any]:
    """Metadata of a small SentencePiece vocabulary, where the longest token has the best score."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "  ", "<end_of_turn>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4, 3]
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.array([len(token) for token in tokens], np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return values | {f"tokenizer.{name}": value for name, value in changes.items()}


def byte_pairs(**changes: Any) -> dict[str, Any]:
    """Metadata of a small byte-level vocabulary."""
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": ["a", "b", "\u0120", "ab", "\u0120ab", "aab", "<|begin|>", "<|eot_id|>"],
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 1, 1, 1, 3, 3], np.int32),
        "tokenizer.ggml.merges": ["a b", "\u0120 ab"],
        "tokenizer.ggml.bos_token_id": 6,
    }
    return values | {f"tokenizer.{name}": value for name, value in changes.items()}


def made_of(values: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = read_gguf_tokenizer(Metadata(values, Path("made.gguf")))
    return read_native(json.loads(tokenizer.text)), {
        "generation": tokenizer.generation_config,
        "special": tokenizer.special_tokens,
        "templates": tokenizer.chat_templates,
    }


def test_pieces_are_joined_by_their_scores() -> None:
    native, _ = made_of(sentence_pieces())
    assert native.encode("abab é", add_special_tokens=True).tokens == [
        *("<s>", "\u2581ab", "ab", "\u2581", "<0xC3>", "<0xA9>")
    ]  # abab can't be reached: the space joins first
    assert native.encode("b  a", add_special_tokens=False).tokens == ["\u2581", "b", "  ", "\u2581a"]
    assert native.decode(native.encode("abab é b").ids) == "abab é b"
    native, _ = made_of(sentence_pieces(**{"ggml.add_space_prefix": False, "ggml.add_bos_token": False}))
    assert native.encode("abab").tokens == ["abab"]
    assert native.decode(native.encode(" ab").ids) == " ab"


def test_a_word_that_is_a_token_is_one_where_the_kind_says_so() -> None:
    native, _ = made_of(byte_pairs())
    assert native.encode("aab ab").tokens == ["<|begin|>", "aab", "\u0120ab"]
    native, _ = made_of(byte_pairs(**{"ggml.pre": "gpt-2"}))
    assert native.encode("aab ab").tokens == ["a", "ab", "\u0120ab"]  # nor does a text begin with a token of its own


def test_what_ends_a_text_and_what_belongs_to_it() -> None:
    _, rest = made_of(sentence_pieces(chat_template="{{ x }}", **{"ggml.padding_token_id": 0}))
    end_of_turn = len(BYTES) + len(PIECES) + 4
    assert rest["generation"] == {"bos_token_id": 1, "eos_token_id": [2, end_of_turn]}
    assert rest["special"] == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    assert rest["templates"] == {"default": "{{ x }}"}
    several = {"chat_templates": ["tool"], "chat_template.tool": "{{ y }}"}
    _, rest = made_of(byte_pairs(**several))
    assert rest["templates"] == {"tool": "{{ y }}"}
    assert rest["generation"] == {"bos_token_id": 6, "eos_token_id": 7}


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (byte_pairs, {"ggml.pre": "martian"}, "tokenizer.ggml.pre as a way to split words that we know, got 'martian'"),
        (byte_pairs, {"ggml.model": "t5"}, "tokenizer.ggml.model as gpt2 or llama in made.gguf, got 't5'"),
        (byte_pairs, {"ggml.merges": None}, "tokenizer.ggml.merges as a list of texts in made.gguf, got none"),
        (byte_pairs, {"ggml.merges": ["a c"]}, "tokenizer.ggml.merges as pairs of tokens that make tokens"),
        (byte_pairs, {"ggml.merges": ["b a"]}, "tokenizer.ggml.merges as pairs of tokens that make tokens"),
        (
            byte_pairs,
            {"ggml.tokens": ["a"] * 8},
            "tokenizer.ggml.tokens as distinct tokens in made.gguf, got 'a twice'",
        ),
        (byte_pairs, {"ggml.tokens": ["a" * 2000]}, "tokenizer.ggml.tokens as tokens of at most 1024 characters"),
        (byte_pairs, {"ggml.token_type": np.ones(3, np.int32)}, "tokenizer.ggml.token_type as 8 numbers"),
        (byte_pairs, {"ggml.bos_token_id": 8}, "tokenizer.ggml.bos_token_id as a number below 8"),
        (byte_pairs, {"ggml.bos_token_id": None}, "tokenizer.ggml.bos_token_id as the token that begins or ends"),
        (byte_pairs, {"ggml.add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token as true or false"),
        (sentence_pieces, {"ggml.scores": None}, "tokenizer.ggml.scores as 269 numbers in made.gguf, got none"),
        (sentence_pieces, {"ggml.unknown_token_id": -1}, "tokenizer.ggml.unknown_token_id as a number below 269"),
        (sentence_pieces, {"chat_template": 5}, "tokenizer.chat_template as a text"),
    ],
)
def test_metadata_that_makes_no_tokenizer_is_named(
    make: Callable[..., dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        made_of(make(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
