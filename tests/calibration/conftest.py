"""A chat model to calibrate on what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
ENDS = list(range(0, 512, 16))


@pytest.fixture(scope="session")
def chat_artifact(tiny_checkpoint: Path, tiny_draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair with a chat template, and so many end tokens that its texts are short."""
    from dovetail.export.artifact.writing import write_artifact

    folder = tmp_path_factory.mktemp("chat")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for path in tiny_checkpoint.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    changes = {"tokenizer_config.json": {"chat_template": TEMPLATE}, "generation_config.json": {"eos_token_id": ENDS}}
    for name, change in changes.items():
        settings = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(settings | change))
    write_artifact(checkpoint, folder / "artifact", draft=tiny_draft)
    return folder / "artifact"
