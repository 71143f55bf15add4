"""Proves who is told what: a command's user everything that the library logs, on stderr; a program that uses the
library nothing but warnings, until it asks for more.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import click
import pytest

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
    assert done.stderr.splitlines() == [
        "the draft failed",
        "dovetail.runtime.pipeline: target: CPU, threads 1, numerics fast, context 64",
        "dovetail.runtime.pipeline: draft: none, plain decoding",
    ]
