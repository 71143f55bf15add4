"""Proves that templates are rendered inside a program that is no Python, that this program is never started, and that
what is missing is said and not blamed on the template.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path

import pytest

from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text import python_program
from dovetail.runtime.text.chat_template import ChatTemplate

ASK = [{"role": "user", "content": "fine"}]


def render() -> str:
    template = ChatTemplate("{{ messages[0].content }}", {})
    try:
        return template.render(ASK)
    finally:
        template.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A program that embeds this interpreter, as `sys.executable`; it leaves a file when it is started."""
    program, before = tmp_path / "server", spawn.get_executable()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\necho ready\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    multiprocessing.set_executable(str(program))
    yield program
    multiprocessing.set_executable(before)
    assert not (tmp_path / "started").exists()


def test_inside_another_program_a_python_is_found(server: Path) -> None:
    assert render() == "fine"


@pytest.mark.parametrize("name", ["", None])
def test_no_executable_at_all(name: str | None, server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", name)
    multiprocessing.set_executable(name or "")
    assert render() == "fine"


def test_the_python_that_multiprocessing_was_told_comes_first(server: Path, tmp_path: Path) -> None:
    told = tmp_path / "my-interpreter"
    told.symlink_to(Path(sys.prefix, "bin", "python3"))
    multiprocessing.set_executable(str(told))
    assert next(iter(python_program.python_programs()))[0] == str(told)


def test_where_there_is_none_that_is_said(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, name, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"expected a Python with jinja2.*got none; name one with multiprocessing"
    ) as one:
        render()
    assert not isinstance(one.value, ArtifactError), "the artifact is sound"
    broken = tmp_path / "bin" / "python3"
    broken.write_text("#!/bin/sh\necho 'No module named jinja2' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match="bin/python3: No module named jinja2"):
        render()


def test_a_found_python_gets_our_modules_and_none_of_the_users_folder(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", *sys.path])
    _, environment = next(iter(python_program.python_programs()))
    assert str(tmp_path) not in environment["PYTHONPATH"].split(os.pathsep)
    assert render() == "fine"
