"""Proves that a failing draft never costs the text: the tokens stay those of plain decoding, one warning is given,
and a draft that never agrees is put to rest and tried again.
"""

from __future__ import annotations

from collections.abc import Callable

import fakes
import numpy as np
import pytest
from dovetail.runtime.decoding.rounds import Round, rounds
from fakes import FakeTarget

from dovetail.runtime.drafts import guard
from dovetail.runtime.drafts.base import Draft, Foresight, NoDraft, blind
from dovetail.runtime.drafts.guard import GuardedDraft
from dovetail.runtime.errors import DraftError
from dovetail.runtime.policies.base import FixedPolicy, Growth
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree

PROMPT = np.array([1, 2, 3], np.int64)
SAMPLED = GenerationConfig(temperature=1.0, seed=4)


class Breaking:
    """A good draft whose call number `when` raises."""

    native_s = 0.0
    bytes_in = bytes_out = 0

    def __init__(self, draft: Draft, when: int, error: Exception) -> None:
        self._draft, self._when, self._error = draft, when, error
        self.calls = 0

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        self.calls += 1
        if self.calls == self._when:
            raise self._error
        return self._draft.propose(tokens, features, growth, foresight)


def run(make: Callable[[FakeTarget], Draft], count: int, config: GenerationConfig = SAMPLED) -> list[Round]:
    target = FakeTarget()
    sampler = Sampler(config, PROMPT.tolist(), target.vocab)
    return list(rounds(target, make(target), FixedPolicy(TreeShape(8, 3, 2)), sampler.draw, PROMPT, count))


def drafted(made: list[Round]) -> list[bool]:
    """Of the rounds behind the prompt's own: whether anything was drafted."""
    assert made[0].nodes == 0
    return [done.nodes > 1 for done in made[1:]]


def tokens(made: list[Round]) -> list[int]:
    return [token for done in made for token in done.tokens]


@pytest.mark.parametrize("error", [RuntimeError("device lost"), MemoryError(), DraftError("not numbers")])
@pytest.mark.parametrize("when", [1, 5])
def test_a_draft_that_fails_is_given_up_and_the_text_goes_on(
    when: int, error: Exception, told: pytest.LogCaptureFixture
) -> None:
    guarded: list[GuardedDraft] = []

    def make(target: FakeTarget) -> Draft:
        guarded.append(GuardedDraft(Breaking(fakes.good(target), when, error)))
        return guarded[0]

    made = run(make, 60)
    assert tokens(made) == tokens(run(lambda target: NoDraft(), 60))
    assert len(told.messages) == 1
    assert type(error).__name__ in told.messages[0]
    assert guarded[0].failure is not None
    assert not any(drafted(made)[when - 1 :])
    assert all(drafted(made)[: when - 1])


def test_ctrl_c_is_not_a_failure_of_the_draft() -> None:
    def make(target: FakeTarget) -> Draft:
        return GuardedDraft(Breaking(fakes.good(target), 2, KeyboardInterrupt()))  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        run(make, 60)


def test_a_draft_that_never_agrees_rests_and_is_tried_again(told: pytest.LogCaptureFixture) -> None:
    greedy = GenerationConfig()
    made = run(lambda target: GuardedDraft(fakes.never(target)), 1000, greedy)
    assert tokens(made) == tokens(run(lambda target: NoDraft(), 1000, greedy))
    assert len(told.messages) == 1
    assert "0%" in told.messages[0]
    with_draft = drafted(made)[:-1]
    first = with_draft.index(False)
    assert first == guard.WINDOW
    again = with_draft.index(True, first)
    assert again - first == guard.REST
    second = with_draft.index(False, again)
    assert second - again == guard.WINDOW
    assert with_draft.index(True, second) - second == 2 * guard.REST


def test_a_draft_worth_its_time_never_rests(told: pytest.LogCaptureFixture) -> None:
    made = run(lambda target: GuardedDraft(fakes.good(target)), 600)
    assert all(drafted(made)[:-1])
    assert not told.messages
