"""The pipeline of the Python API's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from models.tiny_pipeline import assert_nothing_is_taken, open_tiny

from dovetail.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipe(tiny_artifact: Path) -> Iterator[Pipeline]:
    with open_tiny(tiny_artifact) as loaded:
        yield loaded
        assert_nothing_is_taken(loaded)
