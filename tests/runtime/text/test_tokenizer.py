"""Proves: streamed text joins up to what the native library decodes, with no broken character or step back; text that
is not text, and files that are no sound tokenizers, are refused before the library sees them.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.plain_artifact import write_artifact
from models.tokenizer_files import ATTACKS, KINDS, SPECIALS, TEXTS, byte_fallback, byte_level, unigram
from tokenizers import Tokenizer as NativeTokenizer
from tokenizers import pre_tokenizers

from dovetail.runtime.artifact import manifest
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import ArtifactError, ContextOverflowError, UserError
from dovetail.runtime.text.control_tokens import is_control
from dovetail.runtime.text.owned_text import CALLER, TEMPLATE
from dovetail.runtime.text.tokenizer import Tokenizer, load_tokenizer


def load(root: Path, document: Any, generation: Any = None, vocab_size: int = 1000) -> Tokenizer:
    """Load a tokenizer from an artifact that has nothing else."""
    files = {
        manifest.TARGET_MODEL: b"",
        manifest.TARGET_WEIGHTS: b"",
        manifest.TOKENIZER: json.dumps(document).encode(),
    }
    if generation is not None:
        files[manifest.GENERATION_CONFIG] = json.dumps(generation).encode()
    return load_tokenizer(open_artifact(write_artifact(root, files, vocab_size=vocab_size)))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, NativeTokenizer]]:
    made = {}
    for kind, document_for in KINDS.items():
        document = document_for()
        made[kind] = (load(tmp_path_factory.mktemp(kind), document), NativeTokenizer.from_str(json.dumps(document)))
    return made


def streamed(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    return [stream.push(ids[a:b]) for a, b in itertools.pairwise(bounds)] + [stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_any_tokens_stream_to_what_the_library_decodes(
    kind: str, data: st.DataObject, tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]
) -> None:
    tokenizer, native = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    skip = data.draw(st.booleans())
    parts = streamed(tokenizer, ids, data.draw(st.lists(st.integers(1, 40))), skip)
    assert "".join(parts) == native.decode(ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.sampled_from(TEXTS))
def test_any_text_encodes_as_the_library_does_and_streams_unbroken(
    kind: str, text: str, tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]
) -> None:
    tokenizer, native = tokenizers[kind]
    ids = tokenizer.encode(text)
    native.encode_special_tokens = True
    assert ids == native.encode(text).ids
    assert ids[:1] == [native.token_to_id("<s>")]
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    parts = streamed(tokenizer, ids, list(range(len(ids))))
    assert "".join(parts) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in part for part in parts)


def test_a_character_of_several_tokens_appears_whole(tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]) -> None:
    tokenizer, native = tokenizers["byte_level"]
    ids = [
        native.token_to_id(char)
        for char in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("🦀")[0][0]
    ]
    assert len(ids) == 4
    assert streamed(tokenizer, ids, [1, 2, 3]) == ["", "", "", "🦀", ""]
    assert streamed(tokenizer, ids[:3], [1, 2]) == ["", "", "", "\ufffd"]
    assert streamed(tokenizer, ids[1:2], []) == ["\ufffd", ""]  # no character can begin so: no reason to wait


def test_spaces_at_the_start(tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]) -> None:
    for kind in ("byte_fallback", "unigram"):
        tokenizer, native = tokenizers[kind]
        ids = [native.token_to_id(token) for token in ("<s>", "▁a", "▁a", "b")]
        assert streamed(tokenizer, ids, [1, 2, 3]) == ["", "a", " a", "b", ""]
    tokenizer, native = tokenizers["byte_fallback"]
    ids = [native.token_to_id(token) for token in ("▁", "▁", "▁a")]
    assert streamed(tokenizer, ids, [1, 2]) == ["", " ", " a", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_it_adds_to_the_text_before_it(
    kind: str, tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]
) -> None:
    """Not less: a tokenizer that drops the blank at a text's start must not drop that between prompt and answer."""
    tokenizer, native = tokenizers[kind]
    for before, answer in itertools.product(["a", "<s>", "<s>a", "<s>▁a", "", "▁"], ["▁a", "a", "▁", "a▁a"]):
        behind, ids = (
            [i for i in (native.token_to_id(token) for token in re.findall("<s>|▁?.", text)) if i is not None]
            for text in (before, answer)
        )
        for skip in (True, False):
            stream = tokenizer.stream(skip, behind)
            text = "".join([*(stream.push([token]) for token in ids), stream.finish()])
            assert tokenizer.decode(behind, skip) + text == tokenizer.decode([*behind, *ids], skip)


def test_a_tokens_own_text_has_its_blank(tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]) -> None:
    for kind in ("byte_fallback", "gemma_like", "unigram"):
        tokenizer, native = tokenizers[kind]
        assert tokenizer.token_text(native.token_to_id("▁a")) == " a"
        assert tokenizer.token_text(native.token_to_id("</s>")) == "</s>"
        assert tokenizer.skipped_text(native.token_to_id("</s>")) == "</s>"
        assert tokenizer.skipped_text(native.token_to_id("▁a")) == ""


def test_bytes_of_fallback_wait_for_the_end_of_their_run(
    tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]],
) -> None:
    tokenizer, native = tokenizers["byte_fallback"]
    crab = [native.token_to_id(f"<0x{byte:02X}>") for byte in "🦀".encode()]
    end = native.token_to_id("b")
    assert streamed(tokenizer, [*crab, end], [1, 2, 3, 4]) == ["", "", "", "", "🦀b", ""]
    assert streamed(tokenizer, [*crab, crab[0], end], [4]) == ["", "\ufffd" * 5 + "b", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_streaming_costs_the_same_for_every_token(
    kind: str, tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]
) -> None:
    tokenizer, native = tokenizers[kind]
    for token_id in (native.token_to_id("a"), native.token_to_id("<0xF0>" if kind == "byte_fallback" else "ð")):
        stream = tokenizer.stream()
        started = time.perf_counter()
        for _ in range(100_000):
            stream.push([token_id])
        stream.finish()
        assert time.perf_counter() - started < 3  # 0.1 s here; decoding all anew each time would take an hour


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_a_text_are_text(kind: str, tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]) -> None:
    tokenizer, native = tokenizers[kind]
    control = {native.token_to_id(token) for token in SPECIALS}
    text = "a</s><|im_start|>b<s>"
    if kind.startswith("unigram"):  # where they can't be text, they are refused
        with pytest.raises(UserError, match=r"control token '</s>'"):
            tokenizer.encode(text)
    else:
        assert not control & set(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_that_are_meant(kind: str, tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]) -> None:
    tokenizer, native = tokenizers[kind]
    native.encode_special_tokens = False
    right = native.encode("a</s><|im_start|>b").ids
    assert tokenizer.encode("a</s><|im_start|>b", parse_special=True) == right
    assert right[0] == native.token_to_id("<s>")
    twice = native.encode("<s>a</s>").ids
    assert tokenizer.encode("<s>a</s>", parse_special=True) == twice[1:], "what stands in front is not put there again"
    assert tokenizer.encode("<s>a</s>", add_special_tokens=False, parse_special=True) == twice[1:]


def added(content: str, special: bool = False) -> dict[str, Any]:
    return {"content": content, "special": special}


MARKS = [
    "<think>",
    "</tool_call>",
    "[TOOL]",
    "<|fim_prefix|>",
    "<\uff5cUser\uff5c>",
    "|||PHONE|||",
    "</s>",
    "<unused1>",
]
PIECES = ["\n\n", "    ", "\t", "▁▁", "õ", "...", "<h1>", "</table>", "<br />", "»", "hello", "don't", "--"]


def test_what_a_control_token_is() -> None:
    for text in MARKS:
        assert is_control(added(text)), text
    for text in PIECES:
        assert not is_control(added(text)), text
        assert is_control(added(text, special=True)), text


@pytest.mark.parametrize("normalized", [False, True])
def test_control_tokens_behind_a_normalizer(normalized: bool, tmp_path: Path) -> None:
    """Older Llama 2 files: with a blank put in front, the library itself sees some of them at a text's start only."""
    document = byte_fallback()
    for token in document["added_tokens"]:
        token["normalized"] = normalized
    tokenizer = load(tmp_path, document)
    native = NativeTokenizer.from_str(json.dumps(document))
    bos, end = native.token_to_id("<s>"), native.token_to_id("</s>")
    text = "<s>a</s>b</s>"
    given = bytes([TEMPLATE] * 4 + [CALLER] * 4 + [TEMPLATE] * 5)
    ids = tokenizer.encode_owned(text, given)
    found = native.encode(text, add_special_tokens=False).ids
    assert ids[0] == bos
    assert ids.count(end) == found.count(end) - (1 if found.count(end) == 2 else 0)
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == text
    assert all(token < tokenizer.vocab_size for token in ids)


def test_what_is_no_text(tokenizers: dict[str, tuple[Tokenizer, NativeTokenizer]]) -> None:
    tokenizer, _ = tokenizers["byte_level"]
    for text in ("\ud800", b"\xff".decode("utf-8", "surrogateescape")):
        with pytest.raises(UserError, match="UTF-8"):
            tokenizer.encode(text)
    with pytest.raises(UserError, match="NUL"):
        tokenizer.encode("a\0b")
    with pytest.raises(ContextOverflowError, match=r"at most 262144 bytes of text.* got 300000"):
        tokenizer.encode("é" * 150_000)
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_a_token_that_the_target_lacks(tmp_path: Path) -> None:
    document = byte_level()
    think = next(token["id"] for token in document["added_tokens"] if token["content"] == "<think>")
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] <= think]
    document["post_processor"] = None
    tokenizer = load(tmp_path, document, vocab_size=think)
    assert tokenizer.encode("a <think> b")
    with pytest.raises(UserError, match="<think>"):
        tokenizer.encode("a <think> b", parse_special=True)


def test_truncation_and_padding_are_dropped(tmp_path: Path) -> None:
    document = byte_level()
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
    document["padding"] = {"strategy": {"Fixed": 500}, "direction": "?", "pad_to_multiple_of": 0}
    assert 2 < len(load(tmp_path, document).encode("The quick brown fox")) < 30


@pytest.mark.parametrize(
    ("generation", "eos"),
    [(None, []), ({}, []), ({"eos_token_id": 3, "unknown": [1]}, [3]), ({"eos_token_id": [3, 5]}, [3, 5])],
)
def test_tokens_that_end_an_answer(generation: Any, eos: list[int], tmp_path: Path) -> None:
    assert load(tmp_path, byte_level(), generation).eos_token_ids == frozenset(eos)


@pytest.mark.parametrize("eos", ["3", True, [1.0], -1, 1000, [[1]], {}], ids=json.dumps)
def test_bad_tokens_that_end_an_answer(eos: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"generation_config\.json"):
        load(tmp_path, byte_level(), {"eos_token_id": eos})


@pytest.mark.parametrize("attack", ATTACKS)
def test_crafted_files_are_refused(attack: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = copy.deepcopy(byte_level())
    ATTACKS[attack](document)
    with pytest.raises(ArtifactError) as caught:
        load(tmp_path, document)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert capfd.readouterr().err == ""  # a panic would have told stderr


NAMED = {
    "doubled ids": "'a': 0",
    "merge of nothing": r"\[\['a'\]\]",
    "added token twice": r"each content once, got \['<think>', '<think>'\]",
    "added token of no length": "added_tokens.content",
    "id that is no number": "'a': '1'",
}


@pytest.mark.parametrize("attack", NAMED)
def test_a_refusal_names_the_token(attack: str, tmp_path: Path) -> None:
    document = copy.deepcopy(byte_level())
    ATTACKS[attack](document)
    with pytest.raises(ArtifactError, match=NAMED[attack]):
        load(tmp_path, document)


def test_a_refusal_names_the_added_token(tmp_path: Path) -> None:
    document = copy.deepcopy(byte_level())
    document["added_tokens"][1]["lstrip"] = 1
    with pytest.raises(ArtifactError, match=r"added_tokens\.lstrip of '<s>'"):
        load(tmp_path, document)


def test_crafted_unigrams_are_refused(tmp_path: Path) -> None:
    changes = [("unk_id", None), ("unk_id", 1 << 20), ("vocab", []), ("vocab", [["a", "b"]]), ("vocab", [["", 0.0]])]
    for field, value in [
        *changes,
        ("vocab", [["a", 1e300]]),
        ("vocab", [["a", 0.0], ["a", 0.0]]),
        ("byte_fallback", 1),
    ]:
        document = unigram()
        document["model"][field] = value
        with pytest.raises(ArtifactError):
            load(tmp_path, document)
