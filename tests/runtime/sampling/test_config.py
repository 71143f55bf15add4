"""Proves that every control refuses what it cannot mean: wrong types, values out of range, unknown names,
contradictions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dovetail.runtime.errors import UserError
from dovetail.runtime.sampling.config import GenerationConfig

WRONG = [
    ("max_new_tokens", [0, -1, 1.5, "3", True]),
    ("min_new_tokens", [-1, 1.0]),
    ("temperature", [-0.1, 1e-310, float("nan"), float("inf"), "1", True, 101]),
    ("top_k", [-1, 2.0, False]),
    ("top_p", [0, 0.0, 1.1, -1, "0.9"]),
    ("min_p", [-0.1, 1.1]),
    ("typical_p", [0, 1.1]),
    ("repetition_penalty", [0, -1, float("inf")]),
    ("presence_penalty", [float("nan"), "a"]),
    ("frequency_penalty", [float("-inf"), []]),
    ("logit_bias", [[1], {-1: 1.0}, {"1": 1.0}, {1: "x"}, {1: float("nan")}, {1: float("inf")}, 3]),
    ("no_repeat_ngram_size", [-1, 1.5]),
    ("bad_words_ids", ["ab", [3], [[]], [[-1]], [["a"]]]),
    ("eos_token_id", [[-1], ["a"], -3, [1.5], [[1]]]),
    ("ignore_eos", [1, "yes"]),
    ("stop_strings", ["stop", [""], [3]]),
    ("include_stop_str_in_output", [0]),
    ("skip_special_tokens", [0]),
    ("num_return_sequences", [0, 1025, 1.0]),
    ("seed", [-1, 1 << 64, 0.5, "1"]),
    ("logprobs", [-1, 101, True]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG for value in values])
def test_wrong_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{name}.*expected .*got") as raised:
        GenerationConfig().with_changes(**{name: value})
    assert "\n" not in str(raised.value)


def test_every_control_is_in_the_list_above() -> None:
    assert {name for name, _ in WRONG} == {field.name for field in dataclasses.fields(GenerationConfig)}


@pytest.mark.parametrize("controls", [{"min_new_tokens": 9, "max_new_tokens": 8}, {"num_return_sequences": 2}])
def test_contradictions_are_refused(controls: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"expected .* got"):
        GenerationConfig(**controls).check(10)


def test_unknown_controls_are_refused() -> None:
    with pytest.raises(UserError, match="got 'temprature'"):
        GenerationConfig().with_changes(temprature=1)


def test_none_leaves_a_control_as_it_is_and_lists_become_tuples() -> None:
    config = GenerationConfig(top_k=5).with_changes(
        top_k=None, stop_strings=["a"], bad_words_ids=[[1, 2]], eos_token_id=[3]
    )
    assert config == GenerationConfig(
        top_k=5, stop_strings=("a",), bad_words_ids=((1, 2),), eos_token_id=frozenset({3})
    )


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    GenerationConfig(logit_bias={9: 1.0}).check(10)
    for wrong in ({"logit_bias": {10: 1.0}}, {"bad_words_ids": [[1, 10]]}, {"eos_token_id": 10}):
        config = GenerationConfig().with_changes(**wrong)
        with pytest.raises(UserError, match="token ids below 10, got 10"):
            config.check(10)
