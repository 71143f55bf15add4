"""The chat templates of an artifact, out of those that its source has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from dovetail.runtime.artifact import manifest as manifests

_log = logging.getLogger(__name__)

_PLACES = {"default": manifests.CHAT_TEMPLATE, "tool_use": manifests.TOOL_USE_TEMPLATE}
"""What transformers' `apply_chat_template` chooses from; tool_use is for a conversation with tools."""


def write_chat_templates(templates: Mapping[str, str], folder: Path) -> None:
    """Write those of the `templates` (name -> text) that an artifact can use, and log what becomes of the others."""
    if templates and "default" not in templates:
        names = ", ".join(sorted(templates))
        _log.warning("chat template: none; of %s none is called default, pass one with --chat-template", names)
        return
    for name, place in _PLACES.items():
        if name in templates:
            (folder / place).parent.mkdir(exist_ok=True)
            (folder / place).write_text(templates[name], encoding="utf-8")
    others = sorted(templates.keys() - _PLACES.keys())
    if others:
        _log.warning("chat templates: %s left out; default and tool_use are taken", ", ".join(others))


def template_place(folder: Path, has_tools: bool) -> str:
    """Which of the artifact's templates a conversation gets."""
    has_own = has_tools and (folder / manifests.TOOL_USE_TEMPLATE).is_file()
    return manifests.TOOL_USE_TEMPLATE if has_own else manifests.CHAT_TEMPLATE
