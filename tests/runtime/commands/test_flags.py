"""Proves that errors of the library name parameters, and that a command's user reads of flags instead."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest

from dovetail.runtime import EngineConfig, GenerationConfig
from dovetail.runtime.commands.cli import dovetail
from dovetail.runtime.settings import settings_of
from dovetail.runtime.terminal.console import in_flags

ROOT = Path(__file__).resolve().parents[3]
GENERATE = dovetail.commands["generate"]
FLAG = re.compile(r"(?<![\w-])--[a-z]")


def flags_in_errors(source: str) -> list[str]:
    """Of all texts in raise statements, those that name a flag."""
    raised = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    texts = [part.value for node in raised for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return [text for text in texts if isinstance(text, str) and FLAG.search(text)]


def test_the_library_names_no_flags() -> None:
    files = [path for folder in ("runtime", "export", "calibration") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        if path.parent.name != "commands":
            assert not flags_in_errors(path.read_text()), path
    assert flags_in_errors('raise UserError(f"{x}: lower --ctx-size")'), "the scan sees it"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("draft_device 'cuda': no GPU; use draft_device cpu", "--draft-device 'cuda': no GPU; use --draft-device cpu"),
        ("raise it, or lower ctx_size", "raise it, or lower --ctx-size"),
        ("expected min_new_tokens <= max_new_tokens", "expected --min-new-tokens <= --max-new-tokens"),
        ("relax bad_words_ids, or give more", "relax --bad-words-ids, or give more"),
        ("profile '/tmp/seed': expected a file", "--profile '/tmp/seed': expected a file"),
        ("give another `profile`", "give another --profile"),
        ("draft vocabulary 32000 != target vocabulary", "draft vocabulary 32000 != target vocabulary"),
        ("expected a temperature above 0", "expected a temperature above 0"),
        ("/top_k/x top_k.json 'top_k' my_top_k", "/top_k/x top_k.json 'top_k' my_top_k"),
        ("--top-k: expected", "--top-k: expected"),
        ("expected `something` else", "expected `something` else"),
    ],
)
def test_parameters_become_flags(message: str, shown: str) -> None:
    assert in_flags(message, GENERATE) == shown
    assert in_flags(message, None) == message


def test_every_setting_that_has_a_flag_is_shown_as_it() -> None:
    settings = [*settings_of(GenerationConfig).values(), *settings_of(EngineConfig).values()]
    flags = {word for parameter in GENERATE.params if isinstance(parameter, click.Option) for word in parameter.opts}
    for one in settings:
        shown = in_flags(f"{one.name}: expected another, got 3; correct it", GENERATE)
        assert (shown.startswith(f"{one.flag}: ")) == (one.flag in flags), shown
