"""A runner's process, from the parent's side: requests out, answers back, and what is left when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STOP_S = 5.0


class RunnerError(Exception):
    """A runner died, hung, or refused; the message is one line. The benchmark goes on without it."""


class Child:
    """One process that speaks the protocol of `peers/protocol.py`."""

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        """Start `command`; every answer may take `timeout_s`. Raises `RunnerError` if it can't be started."""
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process; `close` ends both
        self._unread, self._is_busy = b"", False
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
            )
        except OSError as error:
            self._errors.close()
            raise RunnerError(f"could not be started: {error.strerror}") from None

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises `RunnerError`; afterwards the child is only good for `close`
        unless it answered with an error itself.
        """
        assert self._process.stdin is not None
        self._is_busy = True
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise RunnerError(self._obituary()) from None
        line = self._line()
        self._is_busy = False
        try:
            reply = json.loads(line)
            assert isinstance(reply, dict)
        except (ValueError, AssertionError):
            raise RunnerError(f"answered what is not JSON: {line[:80]!r}") from None
        if "error" in reply:
            raise RunnerError(str(reply["error"])[:400])
        return reply

    def close(self) -> None:
        """End the process: by the end of its input, or by force where it is at work or does not listen."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if self._is_busy:
            process.kill()
        with contextlib.suppress(OSError):  # it is gone already
            process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._errors.close()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + self._timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._process.kill()
                raise RunnerError(f"gave no answer in {self._timeout_s:.0f} s, and was ended")
            read = os.read(descriptor, 1 << 20)
            if not read:
                raise RunnerError(self._obituary())
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _obituary(self) -> str:
        """How it ended, and the last line it said."""
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "closed its output, and was ended"
        self._errors.seek(0)
        last_words = self._errors.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        ending = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{ending}: {last_words[-1].strip()[:200]}" if last_words else ending


def loaded_child(command: Sequence[str], load: dict[str, Any], timeout_s: float) -> Child:
    """A child that has loaded what it was asked to. Raises `RunnerError`."""
    child = Child(command, timeout_s)
    try:
        child.ask("load", **load)
    except RunnerError:
        child.close()
        raise
    return child


def own_command(words: Sequence[str], timeout_s: float | None = None) -> None:
    """Run a program of ours to its end, for what needs torch. Raises `RunnerError` with its last line."""
    try:
        process = subprocess.run(words, capture_output=True, check=False, timeout=timeout_s, cwd=Path.cwd())
    except subprocess.TimeoutExpired:
        raise RunnerError(f"{' '.join(words[1:4])} took over {timeout_s:.0f} s") from None
    if process.returncode:
        errors = process.stderr.decode("utf-8", "replace").strip().splitlines() or ["no word"]
        raise RunnerError(errors[-1].removeprefix("error: ")[:400])
