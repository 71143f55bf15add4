"""Proves that every control refuses what it cannot mean: wrong types, values out of range, unknown names,
contradictions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.errors import UserError
from dovetail.runtime.sampling.config import GenerationConfig, read_generation_config

WRONG = [
    ("max_new_tokens", [0, -2, 1.5, "3", True]),
    ("max_length", [0, -1, 2.0]),
    ("min_new_tokens", [-1, 1.0]),
    ("min_length", [-1, "4"]),
    ("suppress_tokens", [[-1], "a", [2.0], True]),
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
    ("stop_strings", ["", [""], [3], 3, b"stop"]),
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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_tokens", r"use max_new_tokens \(Tokens to generate"),
        ("do_sample", r"use temperature \(0 decodes greedily\)"),
        ("stop", "use stop_strings "),
        ("n", "use num_return_sequences "),
        ("temprature", "use temperature "),
        ("quite_different", "check its name"),
    ],
)
def test_unknown_controls_are_answered_by_the_one_that_is_meant(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"^expected controls.*, got '{name}'; {meant}"):
        GenerationConfig().with_changes(**{name: 1})


def test_numbers_of_numpy_and_a_single_stop_string_are_taken() -> None:
    given = GenerationConfig(
        max_new_tokens=np.int64(5),  # type: ignore[arg-type]  # who computes has numpy's
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        ignore_eos=np.True_,  # type: ignore[arg-type]
        logit_bias={np.int32(3): np.float64(1.5)},  # type: ignore[dict-item]
        bad_words_ids=[np.array([1, 2]), (np.int64(3),)],  # type: ignore[arg-type]
        eos_token_id=np.array([7, 8]),  # type: ignore[arg-type]
        suppress_tokens=np.int64(9),  # type: ignore[arg-type]
        stop_strings="end",  # type: ignore[arg-type]
    )
    assert given == GenerationConfig(
        max_new_tokens=5,
        temperature=0.5,
        ignore_eos=True,
        logit_bias={3: 1.5},
        bad_words_ids=((1, 2), (3,)),
        eos_token_id=frozenset({7, 8}),
        suppress_tokens=frozenset({9}),
        stop_strings=("end",),
    )
    assert type(given.max_new_tokens) is int
    with pytest.raises(UserError, match="max_new_tokens: expected an integer"):
        GenerationConfig(max_new_tokens=np.float64(5))  # type: ignore[arg-type]


# The artifact's own defaults.


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "top_k": None, "top_p": None}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.7, "top_k": -1}, {"temperature": 0.7, "top_k": 0}),
        ({"do_sample": True, "top_p": 0}, {"temperature": 0.0}),
        ({"do_sample": True, "top_p": 1.0, "top_k": 0, "typical_p": 1.0}, {"temperature": 1.0}),
        ({"eos_token_id": 3}, {"eos_token_id": 3}),
        ({"eos_token_id": [3, 5], "pad_token_id": -1, "_from_model_config": True}, {"eos_token_id": [3, 5]}),
        ({"bad_words_ids": [[4], [1, 2]]}, {"bad_words_ids": ((4,), (1, 2))}),
        ({"suppress_tokens": [7, 9]}, {"suppress_tokens": {7, 9}}),
        ({"suppress_tokens": [], "bad_words_ids": [], "stop_strings": []}, {}),
        ({"stop_strings": "\n\n"}, {"stop_strings": ("\n\n",)}),
        ({"stop_strings": ["a", "b"]}, {"stop_strings": ("a", "b")}),
        ({"max_new_tokens": 512, "min_new_tokens": 2}, {"max_new_tokens": 512, "min_new_tokens": 2}),
        ({"max_length": 4096, "min_length": 9}, {"max_length": 4096, "min_length": 9}),
    ],
)
def test_what_a_generation_config_says(document: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_generation_config(document, 10) == GenerationConfig().with_changes(**expected)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ([], "an object"),
        ({"do_sample": 1}, "do_sample"),
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": [1, 10]}, "eos_token_id: expected token ids below 10, got 10"),
        ({"suppress_tokens": [10]}, "suppress_tokens: expected token ids below 10, got 10"),
        ({"bad_words_ids": [[1, 10]]}, "bad_words_ids: expected token ids below 10, got 10"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_length": 0}, "max_length"),
        ({"stop_strings": [""]}, "stop_strings"),
    ],
)
def test_a_generation_config_that_can_not_be_meant(document: Any, named: str) -> None:
    with pytest.raises(UserError, match=named) as raised:
        read_generation_config(document, 10)
    assert "\n" not in str(raised.value)


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
