"""The table of losslessness: how many texts of every way to decode are those of plain decoding, one text alone.

A cell is an engine, its draft, some controls, and a way; its figure counts the texts that are, token by token, what the
same engine's plain decoding makes with the same controls. Ours have the same log-probabilities too, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dovetail.calibration.bench.markdown import DASH
from dovetail.calibration.bench.runner_process import RunnerError, loaded_child
from dovetail.calibration.bench.workload import cut

QUESTION_TOKENS, LONG_TOKENS, TOGETHER = 150, 400, 8
ALONE, LONG_ALONE, READ_ANEW = "one text", "a long prompt", "second turn, read anew"
TOGETHER_WAY, CHUNKS, CACHED, PREEMPTED = f"{TOGETHER} texts at once", "long prompt", "second turn", "preempted"
WAYS = {ALONE: ALONE, TOGETHER_WAY: ALONE, CHUNKS: LONG_ALONE, CACHED: READ_ANEW, PREEMPTED: ALONE}
"""The ways of the table, each with the way of plain decoding that it is compared with."""
NUMERICS = ("fast", "exact")


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """Token ids: a prompt, what is asked when it was answered, and a prompt that no pass reads at once."""

    question: list[int]
    follow_up: list[int]
    long: list[int]


def make_texts(questions: Sequence[Sequence[int]], room: int) -> list[Text]:
    """A text for every question. The next question follows it; a long prompt is made of those behind it. Two
    questions, and a long prompt, are at most `room` tokens.
    """
    short = [cut(list(ids), min(QUESTION_TOKENS, room // 2)) for ids in questions]
    texts = []
    for i, question in enumerate(short):
        behind = itertools.chain.from_iterable(itertools.islice(itertools.cycle(short), i, None))
        long = list(itertools.islice(behind, min(LONG_TOKENS, room)))
        texts.append(Text(question, short[(i + 1) % len(short)], long))
    return texts


def make_controls(texts: Sequence[Text]) -> dict[str, dict[str, Any]]:
    """The controls of the table by name. The bias is on tokens that are likely to come: those of the questions."""
    asked = [token for text in texts for token in text.question]
    frequent = sorted(set(asked), key=lambda token: (-asked.count(token), token))[:20]
    return {
        "greedy": {},
        "T = 0.8": {"temperature": 0.8},
        "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        "logit bias": {"logit_bias": {token: (-1.5, 1.5)[i % 2] for i, token in enumerate(frequent)}},
        "stop strings": {"stop_strings": (".", "\n")},
    }


def few_pages(texts: Sequence[Text], tokens: int, page_size: int) -> int:
    """Pages of a cache that holds half of the texts of a pass, with their answers, and each of them alone."""
    pages = sorted(-(-(len(text.question) + tokens) // page_size) for text in texts)
    alone = pages[-1] + 2  # of its tree
    return max(sum(pages[:TOGETHER]) // 2, alone)


@dataclasses.dataclass(slots=True)
class Written:
    """What a way made: a text each, compared with `==`, or None where it failed. `accepted` drafted tokens and
    `preemptions` say that there was something to go wrong; None where an engine does not tell. `errors` says why.
    """

    texts: list[Any]
    accepted: int | None = None
    preemptions: int | None = None
    errors: list[str] = dataclasses.field(default_factory=list)


class Writer(Protocol):
    """A loaded engine with one draft. Raises `RunnerError` for what it does not have."""

    def write(self, way: str, texts: Sequence[Text], controls: dict[str, Any], tokens: int, seed: int) -> Written: ...

    def close(self) -> None: ...


class ChildWriter:
    """A writer in a process of its own, which `Child` speaks to."""

    def __init__(self, command: Sequence[str], load: dict[str, Any], timeout_s: float) -> None:
        """Raises `RunnerError`."""
        self._child = loaded_child(command, load, timeout_s)

    def write(self, way: str, texts: Sequence[Text], controls: dict[str, Any], tokens: int, seed: int) -> Written:
        """See `Writer`."""
        asked = [dataclasses.asdict(text) for text in texts]
        return Written(**self._child.ask("run", way=way, texts=asked, controls=controls, tokens=tokens, seed=seed))

    def close(self) -> None:
        """End the process."""
        self._child.close()


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """Rows of the table. `open` loads the engine with one of the `drafts`, by the name that the table gives it; the
    first one is plain decoding. It raises `RunnerError`.
    """

    name: str
    drafts: Sequence[str]
    open: Callable[[str], Writer]


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """`equal` of `texts` are plain decoding's; None where the engine does not have it, and `reason` says why."""

    engine: str
    draft: str
    controls: str
    way: str
    equal: int | None
    texts: int
    departed: list[int] = dataclasses.field(default_factory=list)  # numbers of texts
    accepted: int | None = None
    preemptions: int | None = None
    reason: str | None = None


def measure(
    engines: Sequence[Engine], texts: Sequence[Text], *, tokens: int, seed: int, advance: Callable[[], None]
) -> list[Cell]:
    """All cells, `tokens` a text; `advance` is called behind each."""
    cells = []
    every_controls = make_controls(texts)
    for engine in engines:
        plain: dict[tuple[str, str], Written | RunnerError] = {}
        for draft in engine.drafts:
            with contextlib.closing(_opened(engine, draft)) as writer:
                for name, controls in every_controls.items():
                    for way, reference in WAYS.items():
                        if draft == engine.drafts[0] and (name, reference) not in plain:
                            plain[name, reference] = _written(writer, reference, texts, controls, tokens, seed)
                        made = _written(writer, way, texts, controls, tokens, seed)
                        cells.append(_cell((engine.name, draft, name, way), plain[name, reference], made, len(texts)))
                        advance()
    return cells


class _Absent:
    """The writer in place of one that could not be loaded."""

    def __init__(self, error: RunnerError) -> None:
        self._error = error

    def write(self, *_: Any) -> Written:
        raise self._error

    def close(self) -> None:
        pass


def _opened(engine: Engine, draft: str) -> Writer:
    try:
        return engine.open(draft)
    except RunnerError as error:
        return _Absent(error)


def _written(writer: Writer, *arguments: Any) -> Written | RunnerError:
    """What it writes, or the error that says why it does not."""
    try:
        return writer.write(*arguments)
    except RunnerError as error:
        return error


def _cell(
    names: tuple[str, str, str, str], plain: Written | RunnerError, made: Written | RunnerError, count: int
) -> Cell:
    for one in (plain, made):
        if isinstance(one, RunnerError):
            return Cell(*names, None, count, reason=str(one))
    assert isinstance(plain, Written)
    assert isinstance(made, Written)
    pairs = zip(plain.texts, made.texts, strict=True)
    departed = [i for i, (expected, got) in enumerate(pairs) if got is None or got != expected]
    reason = "; ".join(dict.fromkeys(made.errors)) or None
    return Cell(*names, count - len(departed), count, departed, made.accepted, made.preemptions, reason)


def rows(cells: Sequence[Cell]) -> list[list[str]]:
    """The table: a head, then a row for every engine and draft and a column for every one of the controls. What stands
    in it are the figures of all ways in their order, or one figure where they are all the same.
    """
    controls = list(dict.fromkeys(cell.controls for cell in cells))
    table = [["engine", "draft", *controls]]
    for engine, draft in dict.fromkeys((cell.engine, cell.draft) for cell in cells):
        own = [cell for cell in cells if (cell.engine, cell.draft) == (engine, draft)]
        columns = []
        for name in controls:
            figures = [DASH if cell.equal is None else str(cell.equal) for cell in own if cell.controls == name]
            columns.append(figures[0] if len(set(figures)) == 1 else " / ".join(figures))
        table.append([engine, draft, *columns])
    return table
