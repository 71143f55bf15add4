"""What a chat model says, for its draft to learn from: answers to given questions and to some it makes up itself, made
by the runtime's engine, many at a time.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dovetail.export.sources.base import Source
from dovetail.export.training.answering_target import open_target
from dovetail.export.training.exchange_store import ExchangeStore
from dovetail.runtime.evaluation.exchanges import SELF_MADE, Exchange, FirstTurn, answers, self_made_questions
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.terminal.progress import stage

SAMPLED = (0.7, 1.0)  # every question is answered greedily, and at one of these temperatures
_TEXTS = 32  # made in one pass: nobody waits for one of them


def make_exchanges(source: Source, questions: Sequence[FirstTurn], self_made: int, work: Path) -> list[Exchange]:
    """The answers of the target `source` to the `questions` and to `self_made` of its own, each made twice: greedily
    and sampled. They are kept in `work`, and what is there already is not made again.

    Raises `UserError` where the target has no chat template, and for a question that is too long, by its place.
    """
    store = ExchangeStore(work / "exchanges.jsonl")
    own = list(dict.fromkeys(e.question for e in store.exchanges if _is_self_made(e.question)))
    missing = [pair for pair in _asked([*questions, *own[:self_made]]) if not store.has(*pair)]
    fresh = max(0, self_made - len(own))
    if missing or fresh:
        with open_target(source, work, _TEXTS) as pipe:
            first = max(map(_number, own), default=-1) + 1
            made_up = itertools.islice(self_made_questions(pipe, first), fresh) if fresh else ()
            _add(store, pipe, itertools.chain(missing, _asked(made_up)), len(missing) + 2 * fresh)
    own = list(dict.fromkeys(e.question for e in store.exchanges if _is_self_made(e.question)))
    wanted = {*questions, *own[:self_made]}
    return [exchange for exchange in store.exchanges if exchange.question in wanted]


def _asked(questions: Iterable[FirstTurn]) -> Iterator[tuple[FirstTurn, float]]:
    """Every question twice."""
    for question in questions:
        yield question, 0.0
        yield question, SAMPLED[zlib.crc32(question.source.encode()) % len(SAMPLED)]


def _add(store: ExchangeStore, pipe: Pipeline, asked: Iterable[tuple[FirstTurn, float]], count: int) -> None:
    """Make `count` answers."""
    with stage("answering") as bar:
        for number, exchange in enumerate(answers(pipe, asked), 1):
            store.add(exchange)
            bar.update(min(1.0, number / count), f"{number} answers")


def _is_self_made(question: FirstTurn) -> bool:
    return question.source.startswith(SELF_MADE)


def _number(question: FirstTurn) -> int:
    return int(question.source.removeprefix(SELF_MADE))
