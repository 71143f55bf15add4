"""Proves that a failing draft never costs the text: the tokens stay those of plain decoding, one warning is given, no
other text's draft suffers, and nothing is asked of it any more.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fakes.drafts import FakeDraft, FakeGraph, FakeGrowth, Guess, Texts, knows
from oracles.numpy_target import NumpyTarget

from dovetail.runtime.drafts.base import Foresight, TreeGrowth, blind
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.errors import DraftError
from dovetail.runtime.policies.base import TreeBudget
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.trees.verified import Verified

PROMPT = [1, 2, 3]
COUNT = 60
SAMPLED = GenerationConfig(temperature=1.0, seed=4)
PLACES = ["tell", "grow", "next_call", "take"]


class Breaking(FakeDraft):
    """A good draft that raises at one place of round number `when`. Once it has, it may not be asked again."""

    def __init__(self, guess: Guess, where: str, when: int, error: BaseException) -> None:
        super().__init__(guess)
        self._where, self._left, self._error = where, when, error
        self.is_broken = False

    def at(self, where: str) -> None:
        if where != "abandon":
            assert not self.is_broken, f"{where}: the draft was given up"
        if where == self._where:
            self._left -= 1
            if not self._left:
                self.is_broken = True
                raise self._error

    def tell(self, verified: Verified) -> None:
        self.at("tell")
        super().tell(verified)

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> TreeGrowth:
        self.at("grow")
        return BreakingGrowth(self, root, budget, foresight)


class BreakingGrowth(FakeGrowth):
    def __init__(self, draft: Breaking, *args: Any) -> None:
        super().__init__(draft, *args)
        self._breaking = draft

    def next_call(self, alone: bool = True) -> DraftCall | None:
        self._breaking.at("next_call")
        return super().next_call(alone)

    def take(self, children: Children) -> None:
        self._breaking.at("take")
        super().take(children)

    def abandon(self) -> None:
        self._breaking.at("abandon")
        super().abandon()


@pytest.fixture(scope="module")
def target() -> NumpyTarget:
    return NumpyTarget.random()


@pytest.fixture(scope="module")
def plain(target: NumpyTarget) -> list[int]:
    """The text as plain decoding makes it."""
    return Texts(target, SAMPLED).make([PROMPT], COUNT, [None])[0].text


@pytest.mark.parametrize("error", [RuntimeError("device lost"), MemoryError(), DraftError("not numbers")])
@pytest.mark.parametrize("when", [1, 8])
@pytest.mark.parametrize("where", PLACES)
def test_a_draft_that_fails_is_given_up_and_the_text_goes_on(
    target: NumpyTarget, plain: list[int], where: str, when: int, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    (made,) = Texts(target, SAMPLED).make([PROMPT], COUNT, [Breaking(knows(plain), where, when, error)])
    assert made.text == plain
    assert made.failure is not None
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert type(error).__name__ in warning.getMessage()
    assert made.nodes[-1] == 1
    if when == 1:
        assert set(made.nodes) == {1}
    elif where in ("tell", "grow"):
        assert min(made.nodes[: when - 1]) > 1
        assert set(made.nodes[when:]) == {1}


def test_an_engine_that_fails_ends_the_drafts_that_ask_it(target: NumpyTarget, plain: list[int]) -> None:
    graph = FakeGraph(RuntimeError("device lost"))
    (made,) = Texts(target, SAMPLED, graph=graph).make([PROMPT], COUNT, [FakeDraft(knows(plain))])
    assert made.text == plain
    assert made.failure == "RuntimeError: device lost"
    assert graph.calls == 1


@pytest.mark.parametrize("where", PLACES)
def test_the_other_texts_drafts_go_on(target: NumpyTarget, plain: list[int], where: str) -> None:
    breaking = Breaking(knows(plain), where, 3, RuntimeError("device lost"))
    texts = Texts(target, SAMPLED)
    alone = texts.make([PROMPT] * 3, COUNT, [None] * 3)
    good = [FakeDraft(knows(alone[i].text)) for i in (0, 2)]
    made = texts.make([PROMPT] * 3, COUNT, [good[0], breaking, good[1]])
    assert [one.text for one in made] == [one.text for one in alone]
    assert [one.failure is None for one in made] == [True, False, True]
    for one in (made[0], made[2]):
        assert min(one.nodes[:-1]) > 1


def test_a_draft_that_fails_while_it_is_abandoned_is_given_up(target: NumpyTarget, plain: list[int]) -> None:
    """Its growth is to end because a call that it shared failed; and then that fails, too."""
    texts = Texts(target, SAMPLED, graph=FailingTogether())
    alone = texts.make([PROMPT] * 2, COUNT, [None] * 2)
    drafts = [
        Breaking(knows(alone[0].text), "abandon", 1, RuntimeError("no")),
        FakeDraft(knows(alone[1].text)),
    ]
    made = texts.make([PROMPT] * 2, COUNT, drafts)
    assert [one.text for one in made] == [one.text for one in alone]
    assert [one.failure for one in made] == ["RuntimeError: no", None]
    assert min(made[1].nodes[1:-1]) > 1


class FailingTogether(FakeGraph):
    def run(self, calls: Any) -> list[Children]:
        if len(calls) > 1:
            raise RuntimeError("too many")
        return super().run(calls)


@pytest.mark.parametrize("where", PLACES)
def test_ctrl_c_is_not_a_failure_of_the_draft(target: NumpyTarget, plain: list[int], where: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        Texts(target, SAMPLED).make([PROMPT], COUNT, [Breaking(knows(plain), where, 2, KeyboardInterrupt())])


def test_a_draft_worth_its_time_never_rests(target: NumpyTarget) -> None:
    greedy = Texts(target)
    text = greedy.make([PROMPT], 150, [None])[0].text
    (made,) = greedy.make([PROMPT], 150, [FakeDraft(knows(text))])
    assert made.text == text
    assert min(made.nodes[:-1]) > 1
    assert made.sequence.pace.rests == 0
