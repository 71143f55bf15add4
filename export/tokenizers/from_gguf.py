"""`tokenizer.ggml.*` of a GGUF file -> the text of a tokenizer.json that reads texts as llama.cpp does, and what
belongs to it: special tokens, what ends a text, chat templates.

Two kinds of tokenizers are known. `gpt2`: byte-pair encoding of words (`pre_tokenizers.py`), with its merges. `llama`:
SentencePiece's, whose tokens have scores; it joins the neighbours whose joint token has the highest score, which is
byte-pair encoding with a merge for every way to cut a token in two tokens, in the order of the scores.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.export.sources.gguf_metadata import Metadata
from dovetail.export.tokenizers.pre_tokenizers import PRE_TOKENIZERS
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text import tokenizer_check

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # `tokenizer.ggml.token_type`
_SPACE = "\u2581"  # SentencePiece's sign for it
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelt so in the files
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_ENDS = (  # control tokens that end a turn or a text; files name one of them at most
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<eos>", "</s>"),
    *("<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<EOT>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
_STRIPPING = ("phi-3", "phi3")  # in a model's name: space behind its control tokens is not read
_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """`text`: of tokenizer.json. `special_tokens`: texts by names such as `bos_token`. `generation_config`: the ids
    that begin and end a text. `chat_templates` by name, the usual one as `default`.
    """

    text: str
    special_tokens: Mapping[str, str]
    generation_config: Mapping[str, Any]
    chat_templates: Mapping[str, str]


def read_gguf_tokenizer(metadata: Metadata) -> GgufTokenizer:
    """The tokenizer in `metadata`. Raises `UserError` for a kind that is not known, and where parts are missing or
    contradict one another.
    """
    vocabulary = _Vocabulary(metadata)
    kind = metadata.text("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _byte_pairs(vocabulary)
    elif kind == "llama":
        parts = _sentence_pieces(vocabulary)
    else:
        raise metadata.wrong("tokenizer.ggml.model", "gpt2 or llama", kind)
    document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added_tokens()}
    document |= parts
    try:
        tokenizer_check.check(document)
    except ArtifactError as error:
        raise UserError(f"expected a tokenizer that can be run in {metadata.path}, got: {error}") from None
    return GgufTokenizer(
        text=json.dumps(document, ensure_ascii=False),
        special_tokens={name: vocabulary.texts[i] for name, i in vocabulary.special.items()},
        generation_config=vocabulary.generation_config(),
        chat_templates=_chat_templates(metadata),
    )


class _Vocabulary:
    """The tokens: `texts` and `kinds` by id, `ids` by text, `special` ids by name."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.texts = [
            text or f"[EMPTY_{i}]" for i, text in enumerate(metadata.texts("tokenizer.ggml.tokens"))
        ]  # llama.cpp's name for it
        count = len(self.texts)
        has_kinds = "tokenizer.ggml.token_type" in metadata
        self.kinds = metadata.numbers("tokenizer.ggml.token_type", count) if has_kinds else [_NORMAL] * count
        self.ids = {text: i for i, text in enumerate(self.texts)}
        if len(self.ids) != count:
            twice = next(text for i, text in enumerate(self.texts) if self.ids[text] != i)
            raise metadata.wrong("tokenizer.ggml.tokens", "distinct tokens", f"{twice} twice")
        named = {name: metadata.index(f"tokenizer.ggml.{key}", count) for name, key in _SPECIAL.items()}
        self.special = {name: i for name, i in named.items() if i is not None}

    def added_tokens(self) -> list[dict[str, Any]]:
        """Control tokens, and tokens that are cut out of a text before anything else is done to it."""
        name = self.metadata.text("general.name", "").lower()
        strips = any(part in name for part in _STRIPPING)
        return [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": strips and text not in _NOT_STRIPPING,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for i, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]

    def generation_config(self) -> dict[str, Any]:
        """Which ids begin and end a text."""
        named = [self.metadata.index(f"tokenizer.ggml.{key}_token_id", len(self.texts)) for key in ("eot", "eom")]
        ends = [self.special.get("eos_token"), *named]
        ends += [self.ids[text] for text in _ENDS if text in self.ids and self.kinds[self.ids[text]] == _CONTROL]
        config: dict[str, Any] = {}
        if "bos_token" in self.special:
            config["bos_token_id"] = self.special["bos_token"]
        if distinct := list(dict.fromkeys(end for end in ends if end is not None)):
            config["eos_token_id"] = distinct[0] if len(distinct) == 1 else distinct
        return config

    def around(self, starts: bool) -> dict[str, Any] | None:
        """The start and end token that are put around a text; `starts`: whether, where the file does not say."""
        flags = {"bos": starts, "eos": False}
        tokens = {}
        for name, default in flags.items():
            if self.metadata.flag(f"tokenizer.ggml.add_{name}_token", default):
                if f"{name}_token" not in self.special:
                    raise self.metadata.wrong(f"tokenizer.ggml.{name}_token_id", "the token that begins or ends", None)
                tokens[name] = self.special[f"{name}_token"]
        if not tokens:
            return None
        pieces = {name: {"SpecialToken": {"id": self.texts[i], "type_id": 0}} for name, i in tokens.items()}
        before, after = ([pieces[name]] if name in pieces else [] for name in ("bos", "eos"))
        single, second = (
            [*before, {"Sequence": {"id": text, "type_id": number}}, *after] for number, text in enumerate("AB")
        )
        return {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single + second,
            "special_tokens": {
                self.texts[i]: {"id": self.texts[i], "ids": [i], "tokens": [self.texts[i]]} for i in tokens.values()
            },
        }


def _byte_pairs(vocabulary: _Vocabulary) -> dict[str, Any]:
    metadata = vocabulary.metadata
    pre = metadata.text("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"expected tokenizer.ggml.pre as a way to split words that we know, got {pre[:80]!r} in {metadata.path}; "
            f"export the checkpoint in safetensors, which brings its tokenizer.json"
        )
    splits = PRE_TOKENIZERS[pre]
    merges = []
    for merge in metadata.texts("tokenizer.ggml.merges"):
        left, space, right = merge[1:].partition(" ")  # a part may be a space, but not be empty
        left = merge[:1] + left
        if not space or not {left, right, left + right} <= vocabulary.ids.keys():
            raise metadata.wrong("tokenizer.ggml.merges", "pairs of tokens that make tokens", merge)
        merges.append([left, right])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "normalizer": {"type": "NFC"} if splits.composes else None,
        "pre_tokenizer": splits.as_json(),
        "post_processor": vocabulary.around(splits.starts),
        "decoder": byte_level,
        "model": _model(vocabulary, merges, ignore_merges=splits.whole_words),
    }


def _sentence_pieces(vocabulary: _Vocabulary) -> dict[str, Any]:
    metadata = vocabulary.metadata
    scores = metadata.numbers("tokenizer.ggml.scores", len(vocabulary.texts))
    unknown = vocabulary.special.get("unk_token", 0)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers = [{"type": "Prepend", "prepend": _SPACE}, spaces] if prefix else [spaces]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": vocabulary.around(True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(
            vocabulary,
            _merges_by_score(vocabulary, scores),
            unk_token=vocabulary.texts[unknown],
            fuse_unk=True,
            byte_fallback=all(token in vocabulary.ids for token in _BYTE_TOKENS),
        ),
    }


def _merges_by_score(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[str]:
    """Every way to make a token of two, the highest score first; of one token the shortest left part first, since
    llama.cpp takes the leftmost of equals. Control tokens are no part of a text, what was cut out of it before is not
    in it any more, and it has no spaces.
    """
    plain = {
        text
        for text, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True)
        if kind in (0, _NORMAL, _UNUSED) and " " not in text
    }
    order = sorted((-scores[vocabulary.ids[text]], vocabulary.ids[text], text) for text in plain if len(text) > 1)
    return [
        f"{text[:cut]} {text[cut:]}"
        for _, _, text in order
        for cut in range(1, len(text))
        if text[:cut] in plain and text[cut:] in plain
    ]


def _model(vocabulary: _Vocabulary, merges: Sequence[object], **special: Any) -> dict[str, Any]:
    fields = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return fields | special | {"vocab": vocabulary.ids, "merges": merges}


def _chat_templates(metadata: Metadata) -> dict[str, str]:
    templates = {}
    if "tokenizer.chat_template" in metadata:
        templates["default"] = metadata.text("tokenizer.chat_template")
    if "tokenizer.chat_templates" in metadata:
        for name in metadata.texts("tokenizer.chat_templates"):
            templates[name] = metadata.text(f"tokenizer.chat_template.{name}")
    return templates
