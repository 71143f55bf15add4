"""The tiny artifact in the real engines, a prompt, and how to sample behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.runtime import load
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.trees.shape import TreeShape

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)
PROMPT = "def main(argv):\n    return"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_new_tokens": 24, "ignore_eos": True}


def open_tiny(path: Path, **settings: Any) -> Pipeline:
    settings = {"numerics": "exact", "ctx_size": 256, "tree": TreeShape(8, 3, 3), "chat_template": TEMPLATE, **settings}
    return load(path, **settings)


def assert_nothing_is_taken(pipe: Pipeline) -> None:
    """No page of the target's cache, no row of the draft's."""
    assert pipe.target.free == pipe.target.capacity
    assert pipe.draft is None or pipe.draft.pool.num_free == pipe.draft.pool.max_blocks
