"""A batch's input: looked through once before anything is loaded, then read line by line, never all in memory."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

from dovetail.runtime.batch.line import MAX_LINE_BYTES, Line, LineId, read_line
from dovetail.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class InputFile:
    """`count` lines that are not blank; `sha256` of all bytes. `name` is for messages. A context manager, which closes
    the file.
    """

    name: str
    count: int
    sha256: str
    is_openai: bool
    file: BinaryIO
    size: int

    def lines(self) -> Iterator[Line]:
        """Its lines from the first. What was appended since it was opened is not read."""
        for number, data in _raw_lines(self.file, self.size):
            yield read_line(number, data, self.is_openai)

    def __enter__(self) -> InputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def open_input(path: str) -> InputFile:
    """The file at `path`, looked through; `-` is stdin, which is read to its end first, as every pipe is.

    Raises `UserError` for one that holds no line that can be read, and for two lines with the same id.
    """
    name = "stdin" if path == "-" else path
    with contextlib.ExitStack() as opened:
        try:
            file = _whole(path, opened)
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256()
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
            count, is_openai = _look_through(name, file, size)
        except OSError as error:
            raise UserError(f"{name}: expected a readable file, got {error.strerror}; check the path") from None
        opened.pop_all()  # all is well: it stays open
    return InputFile(name, count, digest.hexdigest(), is_openai, file, size)


def _whole(path: str, opened: contextlib.ExitStack) -> BinaryIO:
    """A file that can be read twice, at its beginning; what is not needed any more is closed."""
    with contextlib.ExitStack() as source_opened:
        source = source_opened.enter_context(open(os.dup(sys.stdin.fileno()) if path == "-" else path, "rb"))
        if stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            source.seek(0)
            opened.push(source_opened.pop_all())
            return source
        copy = opened.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(source, copy)
    copy.seek(0)
    return copy


def _look_through(name: str, file: BinaryIO, size: int) -> tuple[int, bool]:
    """(number of lines, whether the first that can be read is OpenAI's)."""
    count, is_openai, has_readable = 0, False, False
    first_error: UserError | None = None
    seen: set[int] = set()
    for number, data in _raw_lines(file, size):
        line = read_line(number, data, is_openai)
        count += 1
        if line.error is None and not has_readable:
            has_readable, is_openai = True, line.is_openai
        first_error = first_error or line.error
        if line.id is not None:
            key = _key(line.id)
            if key in seen:
                _refuse_twin(name, file, size, line)
            seen.add(key)
    if not has_readable:
        found = f"none that can be read: {first_error}" if first_error else "an empty file; give some prompts"
        raise UserError(f"{name}: expected a JSON object a line, got {found}")
    return count, is_openai


def _refuse_twin(name: str, file: BinaryIO, size: int, line: Line) -> None:
    """Raise `UserError` if an earlier line has the id of `line`; else only their hashes are the same."""
    place = file.tell()
    for number, data in _raw_lines(file, size):
        if number >= line.number:
            break
        if read_line(number, data, False).id == line.id:
            shown = json.dumps(line.id)[:60]
            raise UserError(
                f"{name}: expected another id in every line, got {shown} in lines {number} and {line.number} "
                "(a line without an id has its number); change one"
            )
    file.seek(place)


def _key(line_id: LineId) -> int:
    """64 bits for an id: a million of them fit where a million texts would not."""
    data = json.dumps(line_id).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _raw_lines(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every line that is not blank; of one that is too long only the front."""
    file.seek(0)
    number = read = 0
    while read < size:
        data = file.readline(min(MAX_LINE_BYTES + 1, size - read))
        if not data:
            return
        read += len(data)
        number += 1
        rest = data
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(min(MAX_LINE_BYTES + 1, size - read))
            read += len(rest)
        data = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
        if data.strip():
            yield number, data
