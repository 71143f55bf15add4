"""Proves of every engine setting that wrong values and unknown names are refused before anything is loaded, that
flags, files and docs/python.md know it, and that making one imports no engine.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from dovetail.runtime import EngineConfig, load
from dovetail.runtime.commands import options
from dovetail.runtime.commands.cli import dovetail
from dovetail.runtime.decoding.engine_config import Acceptance, Numerics, Shape
from dovetail.runtime.errors import UserError
from dovetail.runtime.settings import settings_of
from dovetail.runtime.targets.openvino import engine
from dovetail.runtime.trees.shape import TreeShape

SETTINGS = settings_of(EngineConfig)
WRONG: dict[str, list[Any]] = {
    "draft": ["both", None, 1],
    "draft_device": ["tpu", "", None, 3],
    "draft_memory_limit": [0, -1, 1.5, "2GB", True],
    "numerics": ["slow", None],
    "acceptance": ["strict", None, True],
    "threads": [0, 4097, 1.0, "2", True],
    "draft_threads": [0, "2"],
    "ctx_size": [1, 2.5],
    "sequences": [0, 4097, 1.0],
    "tree": [(8, 3, 3), {"nodes": 8}, 8],
    "profile": [3, ""],
    "chat_template": [3, b"x", ""],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{name}: expected .*got") as raised:
        EngineConfig(**{name: value})
    assert "\n" not in str(raised.value)
    assert "--" not in str(raised.value)


def test_every_setting_is_in_the_list_above() -> None:
    assert set(WRONG) == {field.name for field in dataclasses.fields(EngineConfig)}


def test_unknown_names_are_refused_before_anything_is_opened() -> None:
    with pytest.raises(UserError, match=r"expected engine settings out of .*, got 'cores'"):
        load("nowhere", cores=2)
    with pytest.raises(UserError, match=r"expected engine settings, got 'thread'; use threads \(CPU threads\)"):
        load("nowhere", thread=2)


def test_a_config_and_changes_of_it(tiny_artifact: Path) -> None:
    config = EngineConfig(draft="none", ctx_size=64, threads=1)
    with load(tiny_artifact, config, ctx_size=128) as pipe:
        assert (pipe.draft_kind, pipe.ctx_size, pipe.threads) == ("none", 128, 1)
    with pytest.raises(UserError, match="ctx_size: expected an integer from 2 to 512, got 513"):
        load(tiny_artifact, ctx_size=513)


def test_the_target_has_these_numerics_and_ways_to_accept() -> None:
    assert get_args(Numerics) == get_args(engine.Numerics)
    assert get_args(Acceptance) == get_args(engine.Acceptance)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_settings_and_flags_know_each_other(command: str) -> None:
    words = {word for parameter in dovetail.commands[command].params for word in parameter.opts}
    for one in SETTINGS.values():
        if isinstance(one.kind, Shape):
            assert {f"{one.flag}-{part}" for part, *_ in one.kind.parts} <= words
        else:
            assert (one.flag in words) == one.has_flag
        assert set(one.shortcuts) <= words
    assert {part for part, *_ in Shape.parts} == {field.name for field in dataclasses.fields(TreeShape)}
    for part, low, high, _ in Shape.parts:
        for value, is_good in ((low - 1, False), (low, True), (high, True), (high + 1, False)):
            sizes = {"nodes": 1, "depth": 0, "width": 1, part: value}
            if is_good:
                TreeShape(**sizes)
            else:
                with pytest.raises(UserError, match=part):
                    TreeShape(**sizes)


def split(*words: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `generate` makes of its flags."""
    context = dovetail.commands["generate"].make_context("generate", ["ARTIFACT", "PROMPT", *map(str, words)])
    return options.split(context.params)


def test_files_hold_settings_and_controls_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "both.json"
    tree = {"nodes": 9, "depth": 4}
    file.write_text(json.dumps({"draft": "lookup", "numerics": "exact", "seed": 3, "tree": tree, "profile": None}))
    found = split("--config", file, "--tree-depth", 2, "--no-draft", "-t", 2)
    assert found == (
        {"seed": 3},
        {
            "draft": "none",
            "numerics": "exact",
            "tree": {"nodes": 9, "depth": 2},
            "profile": None,
            "threads": 2,
            "trust": False,
        },
    )
    assert split("--exact", "--draft-memory-limit", "1KB", "--draft", "artifact")[1] == {
        "draft": "artifact",
        "draft_memory_limit": 1024,
        "numerics": "exact",
        "trust": False,
    }


@pytest.mark.parametrize("wrong", [{"thread": 2}, {"trust": True}, {"tree": {"node": 2}}, {"tree": [1, 2, 3]}])
def test_a_file_with_other_names_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"^--config .*wrong.json: expected .* got"):
        split("--config", file)


def test_readme_lists_every_setting(documented: Callable[[str, str, list[str]], None]) -> None:
    rows = ["| setting | what it says | default |", "| --- | --- | --- |"]
    rows += [f"| `{one.name}` | {one.help} | {one.default_text or 'none'} |" for one in SETTINGS.values()]
    assert max(map(len, rows)) <= 120
    documented("python.md", "engine", rows)


def test_making_one_imports_no_engine() -> None:
    code = "import sys\nfrom dovetail.runtime import EngineConfig\nEngineConfig()\nprint('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
