"""`tokenizer.json` as untrusted input: an allow-list of components and fields, held before the native library reads it.

The library trusts its input: some values make it panic, abort, or grow a text without bound. What passes here is what
the tokenizers of Llama, Qwen, Mistral, Phi, Gemma and DeepSeek use, with every field of the type and range that they
need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import ArtifactError

MAX_TOKENIZER_BYTES = 128 << 20
_MAX_ID = 1 << 24
_MAX_ADDED_TOKENS = 1 << 16
_MAX_TOKEN_CHARS = 1024
_MAX_REGEX_CHARS = 4096
_MAX_REGEX_GROUPS = 200  # open parentheses: the regex compiler recurses on them
_MAX_GROWTH = 64  # bytes that a normalizer may make of one byte
_MAX_PIECES = 64
_MAX_SEQUENCE_DEPTH = 4

Check = Callable[[Any, str], None]
Table = Mapping[str, Mapping[str, Check]]


def _require(condition: bool, where: str, expected: str, got: object) -> None:
    if not condition:
        raise ArtifactError(
            f"tokenizer.json {where}: expected {expected}, got {strict_json.shown(got)}; "
            "export again with a tokenizer of a supported kind"
        )


def _flag(value: Any, where: str) -> None:
    _require(type(value) is bool, where, "true or false", value)


def _null(value: Any, where: str) -> None:
    _require(value is None or value == "" or (type(value) in (int, float) and value == 0), where, "nothing", value)


def _text(low: int, high: int) -> Check:
    def check(value: Any, where: str) -> None:
        _require(type(value) is str and low <= len(value) <= high, where, f"{low} to {high} characters", value)

    return check


def _number(low: int, high: int) -> Check:
    def check(value: Any, where: str) -> None:
        _require(type(value) is int and low <= value <= high, where, f"an integer from {low} to {high}", value)

    return check


def _one_of(*values: str) -> Check:
    def check(value: Any, where: str) -> None:
        _require(type(value) is str and value in values, where, " or ".join(values), value)

    return check


def _pattern(value: Any, where: str) -> None:
    _require(
        isinstance(value, dict) and len(value) == 1 and not value.keys() - {"String", "Regex"},
        where,
        "a pattern",
        value,
    )
    ((kind, text),) = value.items()
    if kind == "String":
        _text(1, 64)(text, where)
    else:
        _text(1, _MAX_REGEX_CHARS)(text, where)
        _require(text.count("(") <= _MAX_REGEX_GROUPS, where, f"at most {_MAX_REGEX_GROUPS} groups", text.count("("))
        _require(re.search(r"\\[gk]", text) is None, where, "a regular expression without recursion", text)


def _literal(value: Any, where: str) -> None:
    _pattern(value, where)
    _require("String" in value, where, "a literal pattern", value)


_BEHAVIORS = _one_of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_BYTE_LEVEL = {"add_prefix_space": _flag, "trim_offsets": _flag, "use_regex": _flag}
_METASPACE = {
    "replacement": _text(1, 1),
    "str_rep": _text(1, 1),
    "add_prefix_space": _flag,
    "prepend_scheme": _one_of("always", "never", "first"),
    "split": _flag,
}
_OPTIONAL = {"str_rep", "add_prefix_space", "prepend_scheme", "split", "trim_offsets", "use_regex", "behavior"}
_NORMALIZERS: Table = {
    "NFC": {},
    "NFD": {},
    "NFKC": {},
    "NFKD": {},
    "Lowercase": {},
    "StripAccents": {},
    "Strip": {"strip_left": _flag, "strip_right": _flag},
    "Prepend": {"prepend": _text(1, 16)},
    "Replace": {"pattern": _literal, "content": _text(0, 16)},  # a pattern that matches nothing can crash what follows
}
_PRE_TOKENIZERS: Table = {
    "ByteLevel": _BYTE_LEVEL,
    "Metaspace": _METASPACE,
    "Split": {"pattern": _pattern, "behavior": _BEHAVIORS, "invert": _flag},
    "Digits": {"individual_digits": _flag},
    "Punctuation": {"behavior": _BEHAVIORS},
    "Whitespace": {},
    "WhitespaceSplit": {},
}
_DECODERS: Table = {
    "ByteLevel": _BYTE_LEVEL,
    "Metaspace": _METASPACE,
    "ByteFallback": {},
    "Fuse": {},
    "Replace": {"pattern": _literal, "content": _text(0, 64)},
    # stripping at the end as well can take a token's one character twice, which is a crash
    "Strip": {"content": _text(1, 1), "start": _number(0, 16), "stop": _number(0, 0)},
}


def check(document: Any) -> None:
    """Raise `ArtifactError` unless the parsed `tokenizer.json` holds only what the native library reads safely.

    `truncation` and `padding` may hold anything: the caller removes them.
    """
    _require(isinstance(document, dict), "document", "an object", document)
    known = {
        "version",
        "truncation",
        "padding",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
    }
    _require(not document.keys() - known, "document", f"only the keys {', '.join(sorted(known))}", sorted(document))
    _one_of("1.0")(document.get("version"), "version")
    vocab = _check_model(document.get("model"))
    _check_added_tokens(document.get("added_tokens"))
    if document.get("normalizer") is not None:
        growth = _check_component(document["normalizer"], _NORMALIZERS, "normalizers", "normalizer", 0)
        _require(growth <= _MAX_GROWTH, "normalizer", f"growth of a text by at most {_MAX_GROWTH}", growth)
    if document.get("pre_tokenizer") is not None:
        _check_component(document["pre_tokenizer"], _PRE_TOKENIZERS, "pretokenizers", "pre_tokenizer", 0)
    if document.get("post_processor") is not None:
        processors: Table = {
            "ByteLevel": _BYTE_LEVEL,
            "TemplateProcessing": {"single": _null, "pair": _null, "special_tokens": _null},
        }
        _check_component(document["post_processor"], processors, "processors", "post_processor", 0)
    _require(document.get("decoder") is not None, "decoder", "a decoder", None)
    _check_component(document["decoder"], _DECODERS, "decoders", "decoder", 0)
    _require(vocab > 0, "model.vocab", "at least one token", vocab)


def _check_component(value: Any, table: Table, items: str, where: str, depth: int) -> float:
    """One component, or a `Sequence` of them under the key `items`. Returns how many bytes it may make of one."""
    _require(isinstance(value, dict), where, "an object", value)
    kind = value.get("type")
    if kind == "Sequence":
        _require(set(value) == {"type", items}, where, f"the one field {items}", sorted(value))
        inner = value[items]
        _require(
            isinstance(inner, list) and len(inner) <= _MAX_PIECES, where, f"at most {_MAX_PIECES} components", inner
        )
        _require(depth < _MAX_SEQUENCE_DEPTH, where, f"sequences nested at most {_MAX_SEQUENCE_DEPTH} deep", kind)
        growth = 1.0
        for i, component in enumerate(inner):
            growth *= _check_component(component, table, items, f"{where}[{i}]", depth + 1)
        return growth
    _require(type(kind) is str and kind in table, where, f"one of Sequence, {', '.join(table)}", kind)
    if kind == "TemplateProcessing":
        _check_template(value, where)
        return 1.0
    fields = table[kind]
    _require(not value.keys() - fields.keys() - {"type"}, where, f"only the fields {', '.join(fields)}", sorted(value))
    _require(not fields.keys() - value.keys() - _OPTIONAL, where, f"the fields {', '.join(fields)}", sorted(value))
    for name in value.keys() - {"type"}:
        fields[name](value[name], f"{where}.{name}")
    if kind == "Replace":
        old, new = (text.encode("utf-8", "surrogatepass") for text in (value["pattern"]["String"], value["content"]))
        return max(1.0, len(new) / len(old))
    return 1.0


def _check_template(value: dict[str, Any], where: str) -> None:
    """A template may name only special tokens that it defines: the library looks them up without asking."""
    _require(
        set(value) == {"type", "single", "pair", "special_tokens"},
        where,
        "single, pair and special_tokens",
        sorted(value),
    )
    tokens = value["special_tokens"]
    _require(isinstance(tokens, dict) and len(tokens) <= _MAX_PIECES, where, "an object of special tokens", tokens)
    for name, token in tokens.items():
        _require(isinstance(token, dict) and set(token) == {"id", "ids", "tokens"}, where, "id, ids and tokens", token)
        ids, texts = token["ids"], token["tokens"]
        _require(token["id"] == name, where, "a special token under its own name", token["id"])
        _require(
            isinstance(ids, list) and isinstance(texts, list) and 0 < len(ids) == len(texts) <= _MAX_PIECES,
            where,
            "ids",
            ids,
        )
        for token_id, text in zip(ids, texts, strict=True):
            _number(0, _MAX_ID)(token_id, where)
            _text(1, _MAX_TOKEN_CHARS)(text, where)
    for part in ("single", "pair"):
        pieces = value[part]
        _require(isinstance(pieces, list) and len(pieces) <= _MAX_PIECES, where, "a list of pieces", pieces)
        sequences = [_check_piece(piece, tokens, where) for piece in pieces]
        _require(
            part == "pair" or sequences.count("A") == len(sequences) - sequences.count(None) == 1,
            where,
            "the text once",
            pieces,
        )


def _check_piece(piece: Any, tokens: dict[str, Any], where: str) -> str | None:
    """One piece of a template; returns the name of the sequence that it stands for, if it stands for one."""
    _require(isinstance(piece, dict) and len(piece) == 1, where, "SpecialToken or Sequence", piece)
    ((kind, content),) = piece.items()
    _require(kind in ("SpecialToken", "Sequence"), where, "SpecialToken or Sequence", kind)
    _require(isinstance(content, dict) and set(content) == {"id", "type_id"}, where, "id and type_id", content)
    _number(0, 255)(content["type_id"], where)
    known = tokens if kind == "SpecialToken" else ("A", "B")
    _require(type(content["id"]) is str and content["id"] in known, where, "a known piece", content["id"])
    return content["id"] if kind == "Sequence" else None


def _check_model(model: Any) -> int:
    """The model; returns how many tokens it has."""
    _require(isinstance(model, dict), "model", "an object", model)
    vocab = model.get("vocab")
    if model.get("type") == "BPE":
        flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), _flag)
        nothing = dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"), _null)
        for name in model.keys() - {"type", "vocab", "merges", "unk_token"}:
            _require(name in flags or name in nothing, "model", "the fields of a BPE model", name)
            (flags | nothing)[name](model[name], f"model.{name}")
        _require(isinstance(vocab, dict), "model.vocab", "an object", vocab)
        wrong = {token: i for token, i in vocab.items() if not (type(i) is int and 0 <= i < _MAX_ID)}
        wrong = wrong or _with_equal_values(vocab)
        _require(not wrong, "model.vocab", f"distinct ids below {_MAX_ID}", wrong)
        unknown = model.get("unk_token")
        _require(
            unknown is None or (type(unknown) is str and unknown in vocab),
            "model.unk_token",
            "a token of the vocabulary",
            unknown,
        )
        merges = model.get("merges")
        _require(isinstance(merges, list), "model.merges", "a list", merges)
        odd = [merge for merge in merges if not _is_merge(merge)]
        _require(not odd, "model.merges", "pairs of tokens", odd[:1])
        return len(vocab)
    _require(model.get("type") == "Unigram", "model.type", "BPE or Unigram", model.get("type"))
    _require(
        not model.keys() - {"type", "vocab", "unk_id", "byte_fallback"},
        "model",
        "the fields of a Unigram model",
        sorted(model),
    )
    _require(isinstance(vocab, list) and len(vocab) < _MAX_ID, "model.vocab", "a list", vocab)
    odd = [entry for entry in vocab if not _is_scored(entry)]
    _require(not odd, "model.vocab", "tokens with scores", odd[:1])
    doubles = _with_equal_values({i: entry[0] for i, entry in enumerate(vocab)})
    _require(not doubles, "model.vocab", "distinct tokens", doubles)
    _number(0, len(vocab) - 1)(model.get("unk_id"), "model.unk_id")
    _flag(model.get("byte_fallback", False), "model.byte_fallback")
    return len(vocab)


def unknown_id(model: dict[str, Any]) -> int | None:
    """The id that a checked model gives to characters that it does not know, if it has one."""
    if model["type"] == "BPE":
        unknown: int | None = model["vocab"].get(model.get("unk_token"))
        return unknown
    return int(model["unk_id"])


def _is_merge(merge: Any) -> bool:
    if type(merge) is str:
        return merge.count(" ") == 1
    return type(merge) is list and len(merge) == 2 and type(merge[0]) is str and type(merge[1]) is str


def _is_scored(entry: Any) -> bool:
    if type(entry) is not list or len(entry) != 2:
        return False
    token, score = entry
    return (
        type(token) is str and 0 < len(token) <= _MAX_TOKEN_CHARS and type(score) in (int, float) and abs(score) < 1e9
    )


def _check_added_tokens(added: Any) -> None:
    where = "added_tokens"
    _require(
        isinstance(added, list) and len(added) <= _MAX_ADDED_TOKENS,
        where,
        f"a list of at most {_MAX_ADDED_TOKENS}",
        added,
    )
    flags = {"single_word", "lstrip", "rstrip", "normalized", "special"}
    for token in added:
        _require(
            isinstance(token, dict) and set(token) == flags | {"id", "content"}, where, "complete added tokens", token
        )
        _text(1, _MAX_TOKEN_CHARS)(token["content"], f"{where}.content")
        _number(0, _MAX_ID - 1)(token["id"], f"{where}.id of {strict_json.shown(token['content'])}")
        for name in flags:
            _flag(token[name], f"{where}.{name} of {strict_json.shown(token['content'])}")
    for name in ("content", "id"):
        doubles = _with_equal_values({i: token[name] for i, token in enumerate(added)})
        _require(not doubles, where, f"each {name} once", [added[i]["content"] for i in doubles])


def _with_equal_values(table: dict[Any, Any]) -> dict[Any, Any]:
    """The first two entries that have the same value, if there are such."""
    keys: dict[Any, Any] = {}
    for key, value in table.items():
        if value in keys:
            return {keys[value]: value, key: value}
        keys[value] = key
    return {}
