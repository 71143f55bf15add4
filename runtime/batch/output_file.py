"""A batch's output: a line for every line of the input, in order, whatever happens to the process in between.

Beside OUT lies OUT.progress.json until the batch is finished. It says what the batch is made from; the lines in OUT say
how far it is. A half line at the end is what a killed process was writing: it is dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.batch.line import MAX_LINE_BYTES, Line
from dovetail.runtime.errors import ArtifactError, UserError

_FORMAT = 1
_MAX_LINE_BYTES = 64 * MAX_LINE_BYTES  # an answer may have log-probabilities
_MAX_PROGRESS_BYTES = 16 << 20
_REMEDY = "remove it, or give another -o"

Origin = Mapping[str, Any]
"""What a batch is made from: by name, values that JSON can hold."""


@dataclasses.dataclass(slots=True)
class Tally:
    """How far a batch is."""

    done: int = 0  # lines in the output, failed ones too
    failed: list[int] = dataclasses.field(default_factory=list)  # their numbers
    first_error: str = ""

    def add(self, number: int, document: Mapping[str, Any]) -> None:
        """A line more."""
        self.done += 1
        if document.get("error") is not None:
            self.failed.append(number)
            self.first_error = self.first_error or str(document["error"]["message"])


class OutputFile:
    """Use as a context manager: inside it the output is this process' alone. If it is new and
    gets no line, nothing is left.
    """

    def __init__(self, path: str) -> None:
        self.tally = Tally()
        self.seed = 0
        self.batch_id = ""  # the same whenever this batch goes on
        self._path, self._progress = Path(path), Path(f"{path}.progress.json")
        self._file, self._is_new = -1, False

    def __enter__(self) -> OutputFile:
        """Raises `UserError` where it can't be written, or another process writes it."""
        if str(self._path) == "-":
            raise self._refusal("a file, which can be gone on with", "stdout", "choose another -o")
        self._is_new = not self._path.exists()
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise self._refusal("a file to write", error.strerror, "choose another -o") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise self._refusal("a regular file, which can be gone on with", "something else", "choose another -o")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                raise BlockingIOError(errno.EAGAIN, "")  # whoever had it has just removed it
            self._file = descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise self._refusal("a file for this process alone", "one that another writes", "wait for it") from None
        except OSError as error:
            os.close(descriptor)
            raise self._refusal("a file that can be locked", error.strerror, "choose another -o") from None
        except BaseException:  # an interrupt: nothing is written yet
            os.close(descriptor)
            self._file = -1
            if self._is_new:
                self._path.unlink(missing_ok=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):  # what went wrong before is worth more to know
                if self._is_new and os.fstat(self._file).st_size == 0:
                    self._progress.unlink(missing_ok=True)
                    self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def begin(self, origin: dict[str, Any], lines: Iterator[Line], seed: int | None, fallback_seed: int) -> None:
        """Go on behind the lines that are there, which are taken from `lines`; or begin. The batch's seed is `seed` if
        that is given, or else the one it began with, or else `fallback_seed`.

        Raises `UserError` where the output is that of a batch from another `origin`.
        """
        size = os.fstat(self._file).st_size
        known = self._read_progress()
        if size and known is None:
            raise self._refusal("no file yet, or the output of a stopped batch", "a finished or another one")
        if size and known is not None:
            self.seed = int(known["seed"])
            self._check(known, {**origin, "seed": self.seed if seed is None else seed})
            self._skip(lines)
        else:
            self.seed = fallback_seed if seed is None else seed
            self._write_progress({"format": _FORMAT, **origin, "seed": self.seed})
        self.batch_id = f"{origin['input_sha256']}:{self.seed}"

    def write(self, number: int, document: Mapping[str, Any]) -> None:
        """The line for line `number` of the input."""
        text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
        data = memoryview(text.encode("utf-8", "backslashreplace"))  # half a character: its escape is JSON's, too
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise UserError(
                f"{self._path}: expected room for a line more, got {error.strerror}; make some, then run the same "
                "command again: it goes on"
            ) from None
        self.tally.add(number, document)

    def finish(self) -> None:
        """Every line is there: the progress file has served."""
        try:
            os.fsync(self._file)
            self._progress.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{self._path}: expected a disk that keeps it, got {error.strerror}; mend that, then run the same "
                "command again: it goes on"
            ) from None

    def _read_progress(self) -> dict[str, Any] | None:
        try:
            data = self._progress.read_bytes()
            known = strict_json.parse(data, str(self._progress), _MAX_PROGRESS_BYTES, _REMEDY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{self._progress}: expected a readable file, got {error.strerror}; mend its permissions"
            ) from None
        except ArtifactError as error:  # the strict reader takes every file for an artifact's
            raise UserError(str(error)) from None
        if not isinstance(known, dict) or known.get("format") != _FORMAT or type(known.get("seed")) is not int:
            raise UserError(
                f"{self._progress}: expected what this version of dovetail batch writes, got something else; {_REMEDY}"
            )
        return known

    def _write_progress(self, document: Origin) -> None:
        """All of it or nothing, even if the power fails."""
        try:
            strict_json.write(self._progress, json.dumps(document))
        except OSError as error:
            raise UserError(f"{self._progress}: expected a file to write, got {error.strerror}; mend that") from None

    def _check(self, known: Origin, origin: Origin) -> None:
        for name, value in origin.items():
            if known.get(name) != value:
                raise self._refusal(
                    f"the output of this batch ({name} {strict_json.shown(value)})",
                    f"one of another ({name} {strict_json.shown(known.get(name))})",
                )

    def _skip(self, lines: Iterator[Line]) -> None:
        """Count the lines that are there, drop a half one, and take theirs from the input's `lines`."""
        whole = 0
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            while data := file.readline(_MAX_LINE_BYTES + 1):
                if len(data) <= _MAX_LINE_BYTES and not data.endswith(b"\n"):
                    break
                line = next(lines, None)
                self._check_line(self.tally.done + 1, data, line)
                whole += len(data)
        os.ftruncate(self._file, whole)

    def _check_line(self, row: int, data: bytes, line: Line | None) -> None:
        try:
            document = strict_json.parse(data, "", _MAX_LINE_BYTES)
        except ArtifactError:
            document = None
        if line is not None and _answers(document, line):
            self.tally.add(line.number, document)
        else:
            expected = "nothing" if line is None else f"the answer to line {line.number} ({strict_json.shown(line.id)})"
            raise self._refusal(f"{expected} in its line {row}", strict_json.shown(data.decode(errors="replace")))

    def _refusal(self, expected: str, got: str | None, remedy: str = _REMEDY) -> UserError:
        return UserError(f"{self._path}: expected {expected}, got {got}; {remedy}")


def _answers(document: object, line: Line) -> bool:
    """Whether it is what `Results` makes of `line`."""
    if not isinstance(document, dict):
        return False
    own, answer = ("custom_id", "response") if line.is_openai else ("id", "text")
    given, error = document.get(own), document.get("error")
    is_said = error is None and isinstance(document.get(answer), dict if line.is_openai else str)
    is_failed = isinstance(error, dict) and isinstance(error.get("message"), str)
    return type(given) is type(line.id) and given == line.id and (is_said or is_failed)
