"""What a reader of bytes from outside is, how it is judged by one input, and how such inputs are kept."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import re
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.runtime.errors import UserError

SECONDS = 5.0  # of the processor: what an input of a few kilobytes may take
_MAX_MESSAGE = 1500
_LONG_TEXT = 1500


@dataclasses.dataclass(frozen=True, slots=True)
class Reader:
    """`read` returns for bytes that it takes, and raises `UserError` for others; anything else is a fault. `seeds`:
    what it takes, or nearly. `kind`: json, lines (of JSON), header (of safetensors), template, text or bytes, which
    says how an input is changed.
    """

    read: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    kind: str = "json"


def judged(reader: Reader, data: bytes) -> tuple[bool, tuple[str, str] | None]:
    """(whether `data` is taken, None or a fault: where and what, and all of it)."""
    begin = time.process_time()
    refusal = None
    try:
        with np.errstate(all="ignore"):  # numbers may be any
            reader.read(data)
    except UserError as error:
        refusal = str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a native library is no Exception
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dovetail" in frame.filename]
        last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno} {last.name}"
        return False, (what, "".join(traceback.format_exception(error))[-4000:])
    seconds = time.process_time() - begin
    if seconds > SECONDS:
        return refusal is None, ("slow", f"{seconds:.1f} s")
    return refusal is None, None if refusal is None else fault_of_message(refusal)


def fault_of_message(text: str) -> tuple[str, str] | None:
    """An error says in one line of printable text what was expected and what to do."""
    shape = re.sub(r"[^a-z ]+", " ", text.replace(str(scratch()), ""))[:50]
    if "\n" in text or "\r" in text:
        return f"a message of several lines: {shape}", text
    if not text.isprintable():
        return f"a message that does not print: {shape}", repr(text)
    if len(text) > _MAX_MESSAGE:
        return f"a long message: {shape}", text[:4000]
    if not re.search(r"expected|!=|refused by the chat template", text) or not re.search(r"; |: refused", text):
        return f"a message without a remedy: {shape}", text
    return None


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="readers-")


def scratch() -> Path:
    """Where a reader that wants a path finds its file, under the same name again and again."""
    return Path(_temporary().name)


def written(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def also(read: Callable[[], object]) -> None:
    """What may be refused without the whole being refused: only its message is judged."""
    try:
        read()
    except UserError as error:
        if fault_of_message(str(error)) is not None:
            raise


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # -0.0, and 1 beside True


def json_seeds(*documents: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(document).encode() for document in documents]


def packed(data: bytes, was: str = "") -> str:
    """An input as a line of a corpus: text as it is, bytes and long texts compressed. `was`: what once went wrong."""
    entry = {"zlib": base64.b64encode(zlib.compress(data, 9)).decode()}
    with contextlib.suppress(UnicodeDecodeError):
        if len(data) < _LONG_TEXT:
            entry = {"text": data.decode("utf-8")}
    return json.dumps(entry | ({"was": was} if was else {}))


def unpacked(line: str) -> bytes:
    """The input in a line of a corpus."""
    entry = json.loads(line)
    return entry["text"].encode() if "text" in entry else zlib.decompress(base64.b64decode(entry["zlib"]))


def kept(corpus: Path) -> Iterator[bytes]:
    """The inputs that a corpus' file keeps."""
    if corpus.is_file():
        yield from map(unpacked, corpus.read_text(encoding="utf-8").splitlines())
