"""Proves that many requests come out in their order, each as if it had been alone, taken only as far ahead as is
allowed, with the passes kept full meanwhile, and that one request's error is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dovetail.runtime import Request, UserError, load
from dovetail.runtime.decoding.feed import Feed
from dovetail.runtime.errors import TargetError
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.sampling.sampler import Sampler

PROMPTS = ["import os\n", "def main(argv):\n    ", "class Reader:\n", "for name in names:\n"]


@pytest.fixture(scope="module")
def pipe(shipped_artifact: Path) -> Iterator[Pipeline]:
    with load(shipped_artifact, numerics="exact", ctx_size=256, sequences=3, draft="lookup") as opened:
        yield opened


def requests(pipe: Pipeline, count: int, first: int = 4) -> list[Request]:
    """The `first` request has many tokens, the others few."""
    base = pipe.config(temperature=0.8, ignore_eos=True)
    return [Request(PROMPTS[i % 4], base.with_changes(seed=i, max_new_tokens=4 if i else first)) for i in range(count)]


def test_in_order_and_as_if_alone(pipe: Pipeline) -> None:
    asked = requests(pipe, 14, 40)
    outcomes = list(pipe.generate_many(iter(asked)))
    alone = [pipe.generate(request.prompt, request.config) for request in asked]
    assert [outcome.generations[0].token_ids for outcome in outcomes] == [one.token_ids for one in alone]
    assert pipe.engine.is_idle
    assert pipe.target.free == pipe.target.capacity


def test_a_slow_request_holds_the_others_back_but_not_the_engine(pipe: Pipeline) -> None:
    taken: list[int] = []

    def source() -> Iterator[Request]:
        for number, request in enumerate(requests(pipe, 30, 60)):
            taken.append(number)
            yield request

    feed = Feed(pipe, source(), look_ahead=8)
    assert taken == [], "nothing is taken before it is wanted"
    given, most = 0, 0
    while not feed.is_done:
        given += len(feed.advance())
        most = max(most, len(taken) - given)
        if not given:
            assert len(taken) <= 8
    assert given == 30
    assert most <= 8
    assert feed.tokens == 60 + 29 * 4
    # Behind the slow one there is room for two at a time: 29 short texts take far fewer passes than one by one.
    one_by_one = sum(pipe.generate(request.prompt, request.config).rounds for request in requests(pipe, 30, 60))
    assert feed.passes < 0.8 * one_by_one


def test_errors_come_in_their_places(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request | UserError] = [*requests(pipe, 7)]
    base = pipe.config(max_new_tokens=4)
    asked[1] = UserError("could not be read")
    asked[2] = Request("", base)
    asked[3] = Request("import os\n" * 300, base)
    asked[4] = Request("x", base.with_changes(num_return_sequences=2))
    failing = pipe.config(max_new_tokens=4, seed=999)
    asked[5] = Request("import", failing)
    follow = Sampler.follow

    def fail(sampler: Sampler, token: int) -> None:
        if sampler._config.seed == 999:
            raise TargetError("no usable numbers")
        follow(sampler, token)

    monkeypatch.setattr(Sampler, "follow", fail)
    outcomes = list(pipe.generate_many(asked))
    errors = [None if outcome.error is None else str(outcome.error) for outcome in outcomes]
    assert errors[0] is None is errors[6]
    for error, expected in zip(
        errors[1:6],
        ["could not", "at least one token", "fit the context of 256", "greedy answers are all the", "no usable"],
        strict=True,
    ):
        assert error is not None
        assert expected in error
    assert all(bool(outcome.generations) == (outcome.error is None) for outcome in outcomes)


def test_what_is_our_fault_ends_all(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(steps: object, rows: int) -> None:
        raise RuntimeError("out of everything")

    monkeypatch.setattr(pipe.target, "forward", fail)
    with pytest.raises(RuntimeError, match="out of everything"):
        list(pipe.generate_many(requests(pipe, 5)))
    monkeypatch.undo()
    assert pipe.engine.is_idle
    assert pipe.target.free == pipe.target.capacity
    assert len(list(pipe.generate_many(requests(pipe, 2)))) == 2


def test_a_reader_who_goes_away_ends_all(pipe: Pipeline) -> None:
    outcomes = pipe.generate_many(requests(pipe, 20, 60))
    for _ in zip(range(2), outcomes, strict=False):
        pass
    del outcomes
    assert pipe.engine.is_idle
    assert pipe.target.free == pipe.target.capacity


def test_several_answers_to_each(pipe: Pipeline) -> None:
    base = pipe.config(temperature=0.8, max_new_tokens=5, num_return_sequences=3)
    asked = [Request(prompt, base.with_changes(seed=i)) for i, prompt in enumerate(PROMPTS)]
    for request, outcome in zip(asked, pipe.generate_many(asked), strict=True):
        alone = pipe.generate(request.prompt, request.config)
        assert [one.token_ids for one in outcome.generations] == [one.token_ids for one in alone]


def test_no_requests(pipe: Pipeline) -> None:
    assert list(pipe.generate_many([])) == []
