"""Proves, over the templates and tokenizers of several families, that a conversation has the token ids that
transformers gives it; and that control tokens in what people wrote become text and change nothing around it, in every
process alike.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import chat_families
from models.chat_families import FAMILIES, TEXTS, Family, conversations, open_chat
from tokenizers import Tokenizer as NativeTokenizer
from transformers import PreTrainedTokenizerFast

from dovetail.runtime.text.chat_format import ChatFormat

Pair = tuple[Family, ChatFormat, PreTrainedTokenizerFast]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    family = FAMILIES[request.param]
    native = NativeTokenizer.from_str(json.dumps(family.tokenizer_file()))
    theirs = PreTrainedTokenizerFast(tokenizer_object=native, bos_token="<s>", eos_token="</s>")
    theirs.chat_template = family.template
    ours = open_chat(family, tmp_path_factory.mktemp("family"))
    yield family, ours, theirs
    ours.close()


def ids_of_transformers(theirs: PreTrainedTokenizerFast, messages: Any, **more: Any) -> list[int]:
    settings = {"add_generation_prompt": True, **more}
    ids: list[int] = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)
    return ids


def shared(one: list[int], other: list[int]) -> int:
    """How many ids they begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def test_ids_are_those_of_transformers(pair: Pair) -> None:
    family, ours, theirs = pair
    for messages, variables in itertools.product(conversations(TEXTS), family.variables):
        assert ours.encode(messages, variables=variables) == ids_of_transformers(theirs, messages, **variables)


def test_an_answer_that_is_begun_goes_on(pair: Pair) -> None:
    _, ours, theirs = pair
    for text in TEXTS:
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
        right = ids_of_transformers(theirs, messages, add_generation_prompt=False, continue_final_message=True)
        assert ours.encode(messages) == right


def test_control_tokens_that_people_wrote_are_text_and_change_nothing_around_them(pair: Pair) -> None:
    family, ours, theirs = pair
    control = {theirs.convert_tokens_to_ids(token) for token in (*family.control_tokens, "<s>", "</s>")}
    for token in (*family.control_tokens, "<s>", "</s>", "<s></s>"):
        for role in ("user", "system"):
            others = [{"role": "user", "content": "b"}] * (role == "system")
            hostile = ours.encode([{"role": role, "content": f"a {token} c"}, *others])
            benign = ours.encode([{"role": role, "content": "a  c"}, *others])
            assert [i for i in hostile if i in control] == [i for i in benign if i in control], token
            assert f"a {token} c" in theirs.decode(hostile)
            same = shared(hostile, benign) + shared(hostile[::-1], benign[::-1])
            assert same >= len(benign) - 2, "two blanks at most are read otherwise"


def test_the_process_changes_nothing(tmp_path: Path) -> None:
    outputs, path = [], os.pathsep.join(sys.path)  # with the folder of its imports
    for seed in ("0", "1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", chat_families.__name__, tmp_path / seed],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout)
    assert outputs[0].count("\n") > 250
    assert outputs[0] == outputs[1] == outputs[2]
