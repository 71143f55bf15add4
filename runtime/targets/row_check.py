"""The property that the same bytes rest on, checked on this machine: a row has the same bits whatever else is in the
pass, and however its text was cut into passes (docs/lossless.md).

It is a property of OpenVINO's kernels, and which of them run depends on the processor, the threads and the model. So a
pipeline checks it when it first loads an artifact on a machine, a dozen passes, and keeps the result beside the host
profiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import ArtifactError
from dovetail.runtime.hardware.machine import Machine
from dovetail.runtime.targets.base import Step, TargetEngine, TargetSequence
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, chain

_PROMPT = 70  # tokens: two pages and a bit
_DRAWN = 6
_LEAST = 8  # of a prompt
_MAX_BYTES = 1 << 14
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class RowCheck:
    """`differing` names the ways to run in which rows had other bits than in plain decoding; `largest`: how far the
    furthest logit was off.
    """

    compared: int  # rows; 0: the cache is too small to look
    differing: tuple[str, ...]
    largest: float

    @property
    def summary(self) -> str:
        """A few words."""
        if not self.compared:
            return "not checked, the context is too short"
        if not self.differing:
            return f"{self.compared} rows checked, the same bits in any company"
        return f"differ by up to {self.largest:.2g} logits: {', '.join(self.differing)}"


def check_rows(engine: TargetEngine) -> RowCheck:
    """Compare rows of plain decoding with those of chains, branches, chunks, and passes shared with others."""
    context = engine.info.rope_border or engine.info.context_length
    length = min(_PROMPT, context - 2 * _DRAWN, engine.free // 4 - 2 * _DRAWN)
    if length < _LEAST:
        return RowCheck(0, (), 0.0)
    check = _Check(engine, length)
    expected = check.rows(check.decoded, (length,))
    ways: dict[str, Callable[[], Float32s]] = {
        "a chain in one pass": lambda: check.rows(check.chained, (length,)),
        "a prompt in chunks": lambda: check.rows(check.chained, (1, length // 2)),
        "a prompt up to its last token": lambda: check.rows(check.chained, (length - 1,)),
        "beside other texts": lambda: check.rows(check.beside, (length,)),
        "a branch": lambda: check.rows(check.branched, (length,)),
    }
    compared, differing, largest = 0, [], 0.0
    for name, way in ways.items():
        got = way()
        compared += len(got)
        if not np.array_equal(got, expected):
            differing.append(name)
            largest = max(largest, float(np.abs(got - expected).max()))
    return RowCheck(compared, tuple(differing), largest)


class _Check:
    """One text, run in several ways."""

    def __init__(self, engine: TargetEngine, length: int) -> None:
        rng = np.random.default_rng(0)
        self._engine = engine
        self._prompt, self._drawn, self._other = (
            rng.integers(0, engine.info.vocab_size, size) for size in (length, _DRAWN, length)
        )

    def rows(self, run: Callable[[TargetSequence], Float32s], chunks: tuple[int, ...]) -> Float32s:
        """The drawn tokens' rows, `run` behind the prompt, which is cut after `chunks` tokens."""
        with self._read(self._prompt, chunks) as sequence:
            return run(sequence)

    def decoded(self, sequence: TargetSequence) -> Float32s:
        """Token by token."""
        rows = []
        for token in self._drawn:
            rows.append(self._pass(Step(sequence, chain(np.array([token])))))
            sequence.commit([0])
        return np.concatenate(rows)

    def chained(self, sequence: TargetSequence) -> Float32s:
        """All in one pass."""
        return self._pass(Step(sequence, chain(self._drawn)))

    def beside(self, sequence: TargetSequence) -> Float32s:
        """While another text decodes and one reads its prompt."""
        with self._read(self._other[:2], ()) as second, self._read(self._other[:0], ()) as third:
            others = [Step(second, chain(self._other[:3])), Step(third, chain(self._other), [], is_prompt=True)]
            return self._pass(Step(sequence, chain(self._drawn)), *others)

    def branched(self, sequence: TargetSequence) -> Float32s:
        """As a branch, behind another path."""
        decoy = (self._drawn[1] + 1) % self._engine.info.vocab_size
        tokens = np.array([self._drawn[0], decoy, *self._drawn[1:]])
        parents = np.array([-1, 0, 0, *range(2, _DRAWN)])
        rows = self._pass(Step(sequence, Tree(tokens, parents)))
        return rows[[0, *range(2, _DRAWN + 1)]]

    def _pass(self, *steps: Step) -> Float32s:
        return self._engine.forward(steps)[0].logits.copy()

    @contextlib.contextmanager
    def _read(self, tokens: Int64s, chunks: tuple[int, ...]) -> Iterator[TargetSequence]:
        sequence = self._engine.sequence()
        try:
            for part in np.split(tokens, np.cumsum(chunks)):
                if len(part):
                    self._engine.forward([Step(sequence, chain(part), [], is_prompt=True)])
                    sequence.commit(range(len(part)))
            yield sequence
        finally:
            sequence.close()


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A check, and what it was of."""

    artifact: str  # digest
    machine: str  # fingerprint
    numerics: str
    threads: int
    check: RowCheck

    def __post_init__(self) -> None:
        for text in (self.artifact, self.machine, self.numerics, *self.check.differing):
            if not text.isprintable():
                _refuse("texts that print", text)

    @property
    def how(self) -> str:
        """How the artifact was run."""
        return f"{self.numerics}, {self.threads} threads"


def checked(engine: TargetEngine, artifact: str, machine: Machine, threads: int) -> RowCheck:
    """The check of this engine: as it was found before for the same artifact, machine and threads, or made now."""
    path = _path(artifact, machine, engine.numerics, threads)
    record = _read(path)
    if record is None:
        record = Record(artifact, machine.fingerprint, engine.numerics, threads, check_rows(engine))
        with contextlib.suppress(OSError):  # it is made again the next time
            strict_json.write(path, json.dumps(dataclasses.asdict(record)))
        _log.info("rows: %s", record.check.summary)
    if record.check.differing:
        _log.warning(
            "rows of a pass depend on what else is in it here, so texts may depart from plain decoding's: %s",
            record.check.summary,
        )
    return record.check


def kept_records(machine: Machine, artifact: str = "") -> list[Record]:
    """What was found before on this machine, of one artifact or of all."""
    records = [_read(path) for path in sorted(_folder().glob(f"{artifact[:16]}*.json"))]
    return [one for one in records if one is not None and one.machine == machine.fingerprint]


def _folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("dovetail") / "rows"


def _path(artifact: str, machine: Machine, numerics: str, threads: int) -> Path:
    key = hashlib.sha256(f"{machine.fingerprint} {numerics} {threads}".encode()).hexdigest()
    return _folder() / f"{artifact[:16]}-{key[:16]}.json"


def _read(path: Path) -> Record | None:
    try:
        with open(path, "rb") as file:
            document = strict_json.parse(file.read(_MAX_BYTES + 1), str(path), _MAX_BYTES, "remove it")
        return strict_json.decode(Record, document, "rows", _refuse)
    except (OSError, ArtifactError):
        return None


def _refuse(expected: str, got: object) -> NoReturn:
    raise ArtifactError(f"rows: expected {expected}, got {strict_json.shown(got)}; remove it")
