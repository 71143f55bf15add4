"""The process that renders one chat template: started when it is first asked, ended when it takes too long."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from dovetail.runtime.errors import UserError
from dovetail.runtime.text.python_program import python_programs
from dovetail.runtime.text.template_worker import MAX_MEMORY_BYTES, READY

TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0  # a Python and jinja2, from a disk that may be slow
MAX_TEXT_BYTES = 16 << 20


class TemplateProcess:
    """A worker, or none yet. Not for several threads at a time."""

    def __init__(self, setting: Mapping[str, Any]) -> None:
        """`setting`: the first line that the worker reads."""
        self._setting = setting
        self._worker: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The worker's, while there is one."""
        return None if self._worker is None else self._worker.pid

    def ask(self, line: bytes) -> dict[str, Any]:
        """The worker's answer to a job. Raises `UserError` where no Python can be started."""
        if self._worker is not None and self._worker.poll() is not None:  # somebody killed it
            self.close()
        worker = self._worker or self._start()
        assert worker.stdin is not None
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(line)
            worker.stdin.flush()
            try:
                answer = _read_line(worker, TIMEOUT_S)
            except TimeoutError:
                self.close()
                return {"kind": "failed", "error": f"nothing within {TIMEOUT_S:g} s"}
            except BaseException:  # an interrupt: its answer would be taken for the next one's
                self.close()
                raise
        if not answer.endswith(b"\n"):
            self.close()
            limits = f"{MAX_TEXT_BYTES} bytes and {MAX_MEMORY_BYTES} of memory"
            return {"kind": "failed", "error": f"no text below {limits}"}
        document: dict[str, Any] = json.loads(answer)
        return document

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            _end(self._worker)
            self._worker = None

    def _start(self) -> subprocess.Popen[bytes]:
        complaints = []
        for program, environment in python_programs():
            try:
                worker = _started(program, environment)
            except OSError as error:
                complaints.append(f"{program}: {error.strerror}")
                continue
            with contextlib.suppress(TimeoutError):
                if _read_line(worker, START_TIMEOUT_S) == READY:
                    assert worker.stdin is not None
                    worker.stdin.write(json.dumps(self._setting).encode() + b"\n")
                    self._worker = worker
                    return worker
            complaints.append(f"{program}: {_end(worker)}")
        raise UserError(
            "expected a Python with jinja2 for chat templates, which run in a process of their own, got "
            f"{'; '.join(complaints)[:300] or 'none'}; name one with multiprocessing.set_executable"
        )


def _started(program: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # -P: the folder that the user stands in must not provide modules. A session of its own: Ctrl-C is not for it.
    command = [program, "-P", "-m", "dovetail.runtime.text.template_worker"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True)


def _read_line(worker: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """Up to a line's end, to the worker's own, or to more than a line may have. Raises `TimeoutError`."""
    assert worker.stdout is not None
    answer, end = b"", time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while not answer.endswith(b"\n") and len(answer) <= MAX_TEXT_BYTES:
            if not selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            piece = worker.stdout.read1(1 << 20)  # type: ignore[attr-defined]  # a buffered reader
            if not piece:
                break
            answer += piece
    return answer


def _end(worker: subprocess.Popen[bytes]) -> str:
    """End the worker; its last word."""
    worker.kill()
    _, errors = worker.communicate()
    words = errors.decode("utf-8", "replace").strip().splitlines()
    return words[-1] if words else "no word"
