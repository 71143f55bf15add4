"""Small `tokenizer.json` documents of every supported kind, and changes that make a byte-level one an attack."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as NativeTokenizer

TEXTS = [
    "def f(x):\n    return 'é' * x  # größer, 東京, 😀👩‍👩‍👧\n",
    "The quick brown fox. ",
    "    a\tb\r\n",
    "à la 北京 ﷺ ",
]
SPECIALS = ["<s>", "</s>", "<|im_start|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def document_of(native: NativeTokenizer) -> dict[str, Any]:
    native.add_special_tokens(SPECIALS)
    bos = native.token_to_id("<s>")
    native.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    document: dict[str, Any] = json.loads(native.to_str())
    return document


def byte_level() -> dict[str, Any]:
    """As Llama 3, Qwen and GPT-2 are built."""
    native = NativeTokenizer(models.BPE())
    native.normalizer = normalizers.NFC()
    pattern = Regex(r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    native.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    native.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    native.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    native.add_tokens(["<think>"])
    return document_of(native)


PIECES = ["▁", "▁a", "a", "b", "c", "▁▁", "é", "東", "▁the", "\n", "�"]


def byte_fallback() -> dict[str, Any]:
    """As Llama 2, Mistral and Phi-3 are built."""
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIALS, *BYTES, *PIECES])}
    native = NativeTokenizer(
        models.BPE(vocab, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    native.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    native.decoder = decoders.Sequence(steps)
    return document_of(native)


def gemma_like() -> dict[str, Any]:
    """As Gemma is built: nothing is stripped from the start."""
    document = byte_fallback()
    document["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    del document["decoder"]["decoders"][-1]
    return document


def unigram(scheme: str = "always") -> dict[str, Any]:
    """Unigram with metaspaces and byte fallback."""
    pieces = [(token, -float(i)) for i, token in enumerate(["<unk>", *SPECIALS, *BYTES, *PIECES])]
    native = NativeTokenizer(models.Unigram(pieces, 0, True))
    native.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    native.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return document_of(native)


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "gemma_like": gemma_like,
    "unigram": unigram,
    "unigram_never": lambda: unigram("never"),
}


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the document: the last of `path` is the value, the rest leads to its place."""

    def change(document: dict[str, Any]) -> None:
        inner: Any = document
        for key in path[:-2]:
            inner = inner[key]
        inner[path[-2]] = path[-1]

    return change


def _nested(depth: int) -> dict[str, Any]:
    return {"type": "NFC"} if depth == 0 else {"type": "Sequence", "normalizers": [_nested(depth - 1)]}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


SEQUENCE_A = {"Sequence": {"id": "A", "type_id": 0}}
ATTACKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "unknown model": _set("model", "type", "WordPiece"),
    "no model": _set("model", None),
    "no vocabulary": _set("model", "vocab", {}),
    "doubled ids": _set("model", "vocab", "a", 0),
    "huge id": _set("model", "vocab", "a", 1 << 32),
    "negative id": _set("model", "vocab", "a", -1),
    "id that is no number": _set("model", "vocab", "a", "1"),
    "merge of nothing": _set("model", "merges", 0, ["a"]),
    "merge of unknown tokens": _set("model", "merges", 0, ["nope", "nope"]),
    "merge in words": _set("model", "merges", 0, "a b c"),
    "unknown token that is unknown": _set("model", "unk_token", "nope"),
    "dropout": _set("model", "dropout", 0.5),
    "prefix longer than its tokens": _set("model", "continuing_subword_prefix", "##########"),
    "added token without an id": lambda document: document["added_tokens"][0].pop("id"),
    "added token of another id": _set("added_tokens", 0, "id", 999),
    "added token of no length": _set("added_tokens", 0, "content", ""),
    "added token twice": lambda document: document["added_tokens"].append(document["added_tokens"][0]),
    "unknown normalizer": _set("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "normalizer without a type": _set("normalizer", {"prepend": "x"}),
    "normalizers nested deep": _set("normalizer", _nested(50)),
    "normalizer that replaces nothing": _set("normalizer", _replace("", "x")),
    "normalizer that explodes": _set(
        "normalizer", {"type": "Sequence", "normalizers": [_replace("a", "a" * 16), _replace("a", "a" * 16)]}
    ),
    "normalizer of a regex": _set("normalizer", {"type": "Replace", "pattern": {"Regex": "a*"}, "content": " "}),
    "long prefix": _set("normalizer", {"type": "Prepend", "prepend": "x" * 1000}),
    "unknown pre-tokenizer": _set("pre_tokenizer", {"type": "Custom"}),
    "regex that recurses": _set(
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": r"(?<n>a|\g<n>b)"}, "behavior": "Isolated", "invert": False},
    ),
    "regex too deep": _set(
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(" * 2000 + ")" * 2000}, "behavior": "Isolated", "invert": False},
    ),
    "regex that is none": _set(
        "pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
    "unknown post-processor": _set("post_processor", {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}),
    "template of an unknown token": _set(
        "post_processor", "single", [{"SpecialToken": {"id": "<nope>", "type_id": 0}}, SEQUENCE_A]
    ),
    "template with the text twice": _set("post_processor", "single", [SEQUENCE_A, SEQUENCE_A]),
    "template without the text": _set("post_processor", "single", []),
    "template token without ids": _set("post_processor", "special_tokens", "<s>", "ids", []),
    "template token of a huge id": _set("post_processor", "special_tokens", "<s>", "ids", [1 << 40]),
    "no decoder": _set("decoder", None),
    "unknown decoder": _set("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "decoder that strips twice": _set("decoder", {"type": "Strip", "content": " ", "start": 1, "stop": 1}),
    "decoders out of order": _set(
        "decoder", {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}
    ),
    "decoder without its fields": _set("decoder", {"type": "Sequence", "decoders": [{"type": "Replace"}]}),
    "version": _set("version", "2.0"),
    "half a character": _set("model", "vocab", "\ud800", 900),
    "unknown section": _set("extra", 1),
}
