"""Proves of every control in the registry, by running it, that greedy decoding may take the best raw logit exactly
where the registry says so; that each has a flag in both commands; and that README lists them all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.commands.cli import dovetail
from dovetail.runtime.sampling import processors, sampler
from dovetail.runtime.sampling.config import CONTROLS, GenerationConfig
from dovetail.runtime.sampling.controls import Control, TokenBiases, TokenLists, TokenSet
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.settings import Number, Switch, Texts, Whole

V, DRAWS = 40, 12
BASE = GenerationConfig(eos_token_id=frozenset({0, 1, 2}))  # some controls are about them

VALUES: dict[type, Callable[[Any], list[Any]]] = {
    Number: lambda kind: [kind.low + share * (kind.high - kind.low) for share in (0.001, 0.3, 0.7, 1)],
    Whole: lambda kind: [kind.low, kind.low + 1, kind.low + 5, kind.high],
    Switch: lambda kind: [True, False],
    Texts: lambda kind: [("a",), ("b", "c")],
    TokenBiases: lambda kind: [dict.fromkeys(range(3), 50.0), dict.fromkeys(range(30), -math.inf)],
    TokenLists: lambda kind: [((3,), (4,), (5, 6)), tuple((token,) for token in range(20))],
    TokenSet: lambda kind: [frozenset({3}), frozenset(range(9))],
}


def values(one: Control) -> list[Any]:
    """Some that differ from the default."""
    return [value for value in VALUES[type(one.kind)](one.kind) if value != one.default]


def run(config: GenerationConfig) -> tuple[bool, bool]:
    """(every greedy draw was the best of the processed scores, every draw the best raw logit and nothing else said)."""
    rows = np.random.default_rng(0).normal(0, 2, (DRAWS, V)).astype(np.float32)
    rows[:, :8] += 2  # those of the values above often lead
    made = Sampler(config, [3, 4, 3, 5], V)
    is_right, is_plain = True, True
    for row in rows:
        best = int(made.processed(row).argmax())
        token = made.draw(row)
        is_right &= token == best or config.temperature > 0
        is_plain &= token == row.argmax()
    return is_right, is_plain and not made.logprobs


@pytest.mark.parametrize("name", CONTROLS)
def test_greedy_decoding_looks_at_scores_exactly_where_a_control_needs_them(name: str) -> None:
    changes_tokens = False
    for value in values(CONTROLS[name]):
        is_right, is_plain = run(dataclasses.replace(BASE, **{name: value}))
        assert is_right, f"{name}={value}"
        changes_tokens |= not is_plain
    assert changes_tokens == CONTROLS[name].needs_scores


@pytest.mark.parametrize("name", processors.LOGIT_STEPS)
def test_a_control_that_forgot_to_say_so_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = {**CONTROLS, name: dataclasses.replace(CONTROLS[name], needs_scores=False)}
    monkeypatch.setattr(sampler, "CONTROLS", forgetful)
    assert not all(run(dataclasses.replace(BASE, **{name: value}))[0] for value in values(CONTROLS[name]))


def test_a_control_of_the_first_tokens_lets_the_rest_be_plain() -> None:
    made = Sampler(dataclasses.replace(BASE, min_new_tokens=3), [3], V)
    assert made._argmax_from == 3
    assert Sampler(BASE, [3], V)._argmax_from == 0


def test_every_step_is_a_controls() -> None:
    assert set(processors.LOGIT_STEPS) | set(processors.SHAPE_STEPS) <= set(CONTROLS)
    assert not set(processors.LOGIT_STEPS) & set(processors.SHAPE_STEPS)


def test_defaults_are_taken_and_configurations_share_none_that_can_change() -> None:
    for one in CONTROLS.values():
        assert one.frozen(one.default) == one.default == getattr(GenerationConfig(), one.name)
    assert GenerationConfig().logit_bias is not GenerationConfig().logit_bias


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_control_has_a_flag(command: str) -> None:
    words = {parameter.name: parameter.opts for parameter in dovetail.commands[command].params}
    for one in CONTROLS.values():
        assert one.flag in words[one.name]


def test_readme_lists_every_control(documented: Callable[[str, str, list[str]], None]) -> None:
    rows = ["| control | what it does | default | as in |", "| --- | --- | --- | --- |"]
    rows += [f"| `{one.name}` | {one.help} | {one.default_text or 'off'} | {one.as_in} |" for one in CONTROLS.values()]
    assert max(map(len, rows)) <= 120
    documented("../README.md", "controls", rows)
