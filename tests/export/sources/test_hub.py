"""Proves which files of a repository on the hub are fetched: no code, no pickles; of folders chat templates only."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import hub

from dovetail.export.sources.hub import download

WANTED = ["additional_chat_templates/tool_use.jinja", "config.json", "model.safetensors"]
OTHERS = ["additional_chat_templates/evil.py", "evil.py", "onnx/config.json", "original/model.safetensors", "model.bin"]


def test_of_folders_only_chat_templates_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WANTED, *OTHERS):
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    with hub.serving(tmp_path / "files", "someone/tiny", monkeypatch, tmp_path / "cache"):
        folder = download("someone/tiny", "v1", False)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == WANTED
