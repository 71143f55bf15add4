"""Proves of an answer's text, on a target that says what it is told and with real tokenizers: the blank between it and
its prompt is kept; special tokens stop it, and are shown where that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.pipeline import FakePipeline
from fakes.target import FakeTarget
from models.plain_artifact import write_artifact
from models.tokenizer_files import byte_fallback, byte_level, unigram

from dovetail.runtime.artifact import manifest
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.decoding.generation import Generation
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.text.tokenizer import Tokenizer, load_tokenizer
from dovetail.runtime.trees.tree import Float32s


class Parrot(FakeTarget):
    """Says `ids` behind a prompt of `length` tokens."""

    def __init__(self, vocab: int, length: int, ids: list[int]) -> None:
        super().__init__(vocab)
        self._length, self._ids = length, ids

    def row(self, context: Sequence[int]) -> Float32s:
        logits = np.zeros(self.vocab, np.float32)
        logits[self._ids[min(len(context) - self._length, len(self._ids) - 1)]] = 9
        return logits


def tokenizer_of(root: Path, document: dict[str, Any]) -> Tokenizer:
    files = {manifest.TARGET_MODEL: b"", manifest.TARGET_WEIGHTS: b""}
    files[manifest.TOKENIZER] = json.dumps(document).encode()
    return load_tokenizer(open_artifact(write_artifact(root, files)))


def say(tokenizer: Tokenizer, prompt: list[int], ids: list[int], **controls: Any) -> Generation:
    target = Parrot(tokenizer.vocab_size, len(prompt), ids)
    config = GenerationConfig(max_new_tokens=len(ids), **controls)
    return FakePipeline(target, tokenizer=tokenizer).stream(prompt, config).finish()


@pytest.mark.parametrize("document_for", [byte_fallback, unigram])
def test_the_blank_between_prompt_and_answer_is_kept(document_for: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, document_for())
    prompt = tokenizer.encode("a")
    spaced, joined = (tokenizer._native.token_to_id(token) for token in ("▁a", "a"))
    assert say(tokenizer, prompt, [spaced, spaced]).text == " a a"
    assert say(tokenizer, prompt, [joined, spaced]).text == "a a"
    assert say(tokenizer, prompt[:1], [spaced, spaced]).text == "a a", "behind a start token alone a text begins"


def test_special_tokens_stop_and_can_be_shown(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, byte_level())
    prompt = tokenizer.encode("The")
    ids = tokenizer.encode("a<|im_start|>b<think>c</s>d", add_special_tokens=False, parse_special=True)
    assert say(tokenizer, prompt, ids).text == "ab<think>cd"
    shown = say(tokenizer, prompt, ids, skip_special_tokens=False)
    assert shown.text == "a<|im_start|>b<think>c</s>d" == tokenizer.decode(shown.token_ids, skip_special_tokens=False)
    for stop, text in (("<|im_start|>", "a"), ("a<|im_start|>b", ""), ("<think>", "ab"), ("</s>", "ab<think>c")):
        stopped = say(tokenizer, prompt, ids, stop_strings=[stop])
        assert (stopped.text, stopped.finish_reason) == (text, "stop")
    included = {"stop_strings": ["b<think>c</s>"], "include_stop_str_in_output": True}
    assert say(tokenizer, prompt, ids, **included).text == "ab<think>c"
    assert say(tokenizer, prompt, ids, skip_special_tokens=False, **included).text == "a<|im_start|>b<think>c</s>"


def test_the_token_that_ends_an_answer_is_shown_with_the_special_ones_only(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, byte_level())
    ids = tokenizer.encode("a</s>b", add_special_tokens=False, parse_special=True)
    for end in (ids[1], ids[0]):
        ends = frozenset({end})
        assert say(tokenizer, [5], ids, eos_token_id=ends).text == ("a" if end == ids[1] else "")
        shown = say(tokenizer, [5], ids, eos_token_id=ends, skip_special_tokens=False)
        assert shown.text == tokenizer.decode(shown.token_ids, skip_special_tokens=False)
