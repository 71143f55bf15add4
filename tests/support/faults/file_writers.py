"""A program for tests/laws/test_file_faults.py: every writer of ours, killed or refused at each of its steps.

It runs behind `file_faults.c` and does every run in a fork of itself, so that a kill costs nothing. The last line of
stdout is how many runs there were of each writer, as JSON; an invariant that does not hold is an exception.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.plain_artifact import write_artifact

from dovetail.export.artifact.atomic_file import replacing
from dovetail.export.artifact.atomic_folder import appearing
from dovetail.runtime.artifact import manifest, strict_json
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.batch.input_file import open_input
from dovetail.runtime.batch.output_file import OutputFile
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import is_of_a_file

KINDS = {"full": 1, "broken": 2, "killed": 3, "killed behind": 4}
OLD, NEW = "the old one\n" * 50, "the new one\n" * 70
MISTAKE = 2  # exit code: one line for the user
OURS = 1
LINES = 4


class Faults:
    """The library that this program runs behind."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)

    def run(self, folder: Path, at: int, kind: int, work: Callable[[], object]) -> tuple[int, int]:
        """(exit status of `work` in a process of its own, how many calls it made)."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            code = 0
            self._library.faults_arm(os.fsencode(folder), at, kind)
            try:
                work()
            except UserError:
                code = MISTAKE
            except OSError as error:
                code = MISTAKE if is_of_a_file(error) else OURS
            except BaseException:
                traceback.print_exc()
                code = OURS
            os.write(writing, str(self._library.faults_count()).encode())
            os._exit(code)
        os.close(writing)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        count = os.read(reading, 20)
        os.close(reading)
        return status, int(count or 0)


class Writer:
    """What is written, and what must hold of it."""

    def prepare(self, folder: Path) -> None:
        """What lies there before."""

    def write(self, folder: Path) -> None:
        """The work that is disturbed."""
        raise NotImplementedError

    def check_whatever_happened(self, folder: Path) -> None:
        """Nothing is lost, nothing is half there."""

    def check_done(self, folder: Path) -> None:
        """Behind a run that nothing disturbed."""
        raise NotImplementedError


class ProfileWriter(Writer):
    """`strict_json.write`: host profiles, rows, reports, a batch's progress."""

    def prepare(self, folder: Path) -> None:
        (folder / "file").write_text(OLD)

    def write(self, folder: Path) -> None:
        strict_json.write(folder / "file", NEW)

    def check_whatever_happened(self, folder: Path) -> None:
        assert (folder / "file").read_text() in (OLD, NEW)
        for path in folder.iterdir():  # what a kill left is old the next time
            os.utime(path, (0, 0))

    def check_done(self, folder: Path) -> None:
        assert (folder / "file").read_text() == NEW
        assert [path.name for path in folder.iterdir()] == ["file"]


class FileWriter(ProfileWriter):
    """`replacing`: what an export writes alone."""

    def write(self, folder: Path) -> None:
        with replacing(folder / "file") as beside:
            beside.write_text(NEW)


class BatchWriter(Writer):
    """A batch's output, whose lines are never made twice."""

    def write(self, folder: Path) -> None:
        with OutputFile(str(folder / "out")) as out, open_input(str(folder.parent / "input")) as source:
            lines = source.lines()
            out.begin({"input_sha256": source.sha256}, lines, 3, 0)
            for line in lines:
                out.write(line.number, {"id": line.id, "text": f"answer {line.number}" * 20})
            out.finish()

    def _text(self, folder: Path) -> str:
        out = folder / "out"
        return out.read_text() if out.exists() else ""

    def check_whatever_happened(self, folder: Path) -> None:
        whole = "".join(
            json.dumps({"id": number, "text": f"answer {number}" * 20}) + "\n" for number in range(1, LINES + 1)
        )
        text = self._text(folder)
        assert whole.startswith(text)
        if 0 < len(text) < len(whole):
            assert (folder / "out.progress.json").exists(), "else it could not go on"
        if text == whole and not (folder / "out.progress.json").exists():  # it was done: another run would be refused
            (folder / "out").unlink()

    def check_done(self, folder: Path) -> None:
        text = self._text(folder)
        self.check_whatever_happened(folder)
        assert text.count("\n") == LINES
        assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} <= {"out"}


class ArtifactWriter(Writer):
    """An export: a folder that is there whole or not at all, and replaces another in one step."""

    def __init__(self, force: bool) -> None:
        self._force = force

    def _artifact(self, folder: Path, text: str) -> None:
        files = {name: text.encode() for name in (manifest.TARGET_MODEL, manifest.TARGET_WEIGHTS, manifest.TOKENIZER)}
        write_artifact(folder, files)

    def prepare(self, folder: Path) -> None:
        if self._force:
            self._artifact(folder / "out", OLD)

    def write(self, folder: Path) -> None:
        if not self._force and (folder / "out").exists():  # the run before was done, but for a kill at its end
            return
        with appearing(folder / "out", self._force) as made:
            self._artifact(made, NEW)

    def check_whatever_happened(self, folder: Path) -> None:
        if self._force or (folder / "out").exists():
            content = open_artifact(folder / "out").file(manifest.TOKENIZER).read_text()
            assert content in ((OLD, NEW) if self._force else (NEW,))

    def check_done(self, folder: Path) -> None:
        self.check_whatever_happened(folder)
        assert open_artifact(folder / "out").file(manifest.TOKENIZER).read_text() == NEW
        if self._force:
            assert [path.name for path in folder.iterdir()] == ["out"]


WRITERS: dict[str, Writer] = {
    "profile": ProfileWriter(),
    "file": FileWriter(),
    "batch": BatchWriter(),
    "artifact": ArtifactWriter(False),
    "artifact in place of another": ArtifactWriter(True),
}


def fresh(folder: Path, writer: Writer) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer.prepare(folder)
    return folder


def main(scratch: Path) -> None:
    """Every writer, every step of it, every kind of fault."""
    faults, runs = Faults(), dict[str, Any]()
    (scratch / "input").write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(LINES)))
    for name, writer in WRITERS.items():
        folder = fresh(scratch / "place", writer)
        status, steps = faults.run(folder, 0, 0, lambda writer=writer, folder=folder: writer.write(folder))
        assert status == 0, f"{name}: undisturbed"
        writer.check_done(folder)
        assert steps >= 3, f"{name}: the library counted {steps} steps"
        for at, (kind, number) in itertools.product(range(1, steps + 1), KINDS.items()):
            where = f"{name}, step {at} of {steps}, {kind}"
            folder = fresh(scratch / "place", writer)
            work = lambda writer=writer, folder=folder: writer.write(folder)  # noqa: E731  # forked with its own
            status, _ = faults.run(folder, at, number, work)
            assert status in (0, MISTAKE, -9), f"{where}: exit {status}"
            try:
                writer.check_whatever_happened(folder)
                status, _ = faults.run(folder, 0, 0, work)
                assert status == 0, f"exit {status} of the next run"
                writer.check_done(folder)
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        runs[name] = {"steps": steps, "runs": steps * len(KINDS)}
    print(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
