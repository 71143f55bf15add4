"""Proves who is told what: a command's user everything that the library logs, on stderr; a program that uses the
library nothing but warnings, until it asks for more. And that a command ends well whatever the shell, the disk and
signals do to it: one line, an exit code that says what happened, and nothing half done.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dovetail.runtime.terminal import console
from dovetail.runtime.terminal.console import run


@click.command()
def speaking() -> None:
    logger = logging.getLogger("dovetail.runtime.somewhere")
    logger.debug("unheard")
    logger.info("draft: 100% on cpu")
    logger.warning("the draft failed")


def test_commands_print_what_is_logged(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speaking"])
    for _ in range(2):  # and once each time
        with pytest.raises(SystemExit):
            run(speaking, "speaking")
        assert capsys.readouterr() == ("", "draft: 100% on cpu\nwarning: the draft failed\n")
    logger = logging.getLogger("dovetail")
    assert (logger.handlers, logger.level) == ([], logging.NOTSET)


def test_notices_show_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    console.notice("an artifact called \x1b]0;mine\x07\u202e\nsecond line")
    assert capsys.readouterr().err == "an artifact called \ufffd]0;mine\ufffd\ufffd\nsecond line\n"


def test_the_library_is_silent_until_it_is_asked(tiny_artifact: Path) -> None:
    code = f"""
import logging
from dovetail.runtime import load
load({str(tiny_artifact)!r}, ctx_size=64)
logging.getLogger("dovetail.runtime.drafts.guard").warning("the draft failed")
logging.basicConfig(level="INFO", format="%(name)s: %(message)s")
load({str(tiny_artifact)!r}, ctx_size=64, threads=1, draft="none")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "rows: " not in line]  # told when they are first checked
    assert lines == [
        "the draft failed",
        "dovetail.runtime.pipeline: target: CPU, threads 1, numerics fast, context 64",
        "dovetail.runtime.pipeline: draft: none, plain decoding",
    ]


# What a shell may do to a command, and what a disk may.

DOVETAIL = [sys.executable, "-m", "dovetail.runtime.commands.cli"]


def shell(line: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `line`, in which "$@" is `dovetail` and `words`."""
    command = ["bash", "-c", line, "bash", *DOVETAIL, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def mistake(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a user's mistake."""
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return errors[0]


@pytest.mark.parametrize("words", [["inspect"], ["generate", "x", "-n", "3"]])
def test_a_stdout_that_takes_nothing(shipped_artifact: Path, words: list[str]) -> None:
    command, *rest = words
    done = shell('"$@" > /dev/full', command, shipped_artifact, *rest)
    assert "No space left on device; free some space" in mistake(done)
    assert "expected a stdout to write to, got a closed one" in mistake(
        shell('"$@" >&-', command, shipped_artifact, *rest)
    )


def test_a_reader_that_goes_away(shipped_artifact: Path) -> None:
    line = '"$@" | head -c 3 > /dev/null; exit "${PIPESTATUS[0]}"'
    done = shell(line, "generate", shipped_artifact, "def main(argv):", "-n", 400, "--ignore-eos")
    assert done.returncode == 128 + signal.SIGPIPE
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", ['"$@" 2>&-', '"$@" 2>/dev/full', '"$@" <&-'])
def test_nobody_who_listens_to_notices_stops_nothing(shipped_artifact: Path, line: str) -> None:
    words = ("generate", shipped_artifact, "def main(argv):", "-n", 8, "--temperature", 0)
    done = shell(line, *words)
    assert (done.returncode, done.stdout) == (0, shell('"$@"', *words).stdout)


def test_files_that_can_be_neither_read_nor_written(shipped_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("{")
    inside = file / "inside"  # of what is no folder
    generate = ("generate", shipped_artifact, "x", "-n", 1)
    for words, expected in (
        ((*generate[:2], "-f", inside), "Not a directory"),
        ((*generate[:2], "-f", tmp_path), "Is a directory"),
        ((*generate, "--config", inside), "Not a directory"),
        ((*generate, "--config", file), "strict JSON"),
        ((*generate, "--config", tmp_path), "Is a directory"),
        ((*generate, "--chat-template", inside), "Not a directory"),
        ((*generate, "--profile", inside), "Not a directory"),
        ((*generate, "--profile", file), "strict JSON"),
        (("inspect", inside), "nothing there"),
        (("batch", shipped_artifact, file, "-o", inside), "Not a directory"),
        (("batch", shipped_artifact, file, "-o", "/dev/full"), "a regular file"),
        (("batch", shipped_artifact, inside, "-o", tmp_path / "out"), "Not a directory"),
        (("calibrate", shipped_artifact, "--text", inside), "Not a directory"),
        (("calibrate", shipped_artifact, "--profile", inside), "a place to write"),
        (("calibrate", shipped_artifact, "--profile", tmp_path), "got the folder"),
        (("bench", shipped_artifact, "--report", inside / "too"), "a place to write"),
    ):
        assert expected in mistake(shell('"$@"', *words)), words
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@click.command()
@click.argument("number", type=int)
def failing(number: int) -> None:
    raise OSError(number, os.strerror(number), "/some/file")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EMFILE])
def test_an_error_of_a_file_is_one_line(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["failing", str(number)])
    monkeypatch.setattr(console, "_redirect", lambda number: None)
    with pytest.raises(SystemExit) as ended:
        run(failing, "failing")
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(
        f"error: expected a file /some/file that can be read or written, got: {os.strerror(number)};"
    )
    assert line.count("\n") == 1


def test_another_error_of_the_system_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["failing", str(errno.EINVAL)])
    with pytest.raises(OSError, match="/some/file"):
        run(failing, "failing")


STOPPED = """
import sys, time
from pathlib import Path
import click
from dovetail.export.artifact.atomic_folder import appearing
from dovetail.runtime.terminal.console import run

@click.command()
@click.argument("out", type=Path)
def slow(out):
    with appearing(out) as folder:
        (folder / "half").write_text("x")
        print("ready", flush=True)
        time.sleep(60)

run(slow, "slow")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_program_that_is_stopped_leaves_nothing_half_done(number: int, tmp_path: Path) -> None:
    code = f"import signal; signal.signal({int(number)}, signal.{{}})\n"  # whatever this process ignores (`nohup`)
    code = code.format("default_int_handler" if number == signal.SIGINT else "SIG_DFL") + STOPPED
    running = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    running.send_signal(number)
    assert running.wait(20) == 128 + number
    running.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_signals_that_are_ignored_stay_so(tmp_path: Path) -> None:
    """As `nohup` has it."""
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code += "from dovetail.runtime.terminal.console import ended_by_signals\n"
    code += "with ended_by_signals(): signal.raise_signal(signal.SIGHUP)\nprint('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "went on\n"
