"""Proves what the strict reader refuses of JSON that is valid, and what of a stranger's text a terminal gets to see."""

from __future__ import annotations

import pytest

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import ArtifactError


@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}")])
def test_depth(pair: tuple[str, str]) -> None:
    """What is read can be shown and written: there is room left to recurse on it."""
    strict_json.parse((pair[0] * 100 + "1" + pair[1] * 100).encode(), "file", 1 << 20)
    for depth in (101, 900, 100_000):
        text = pair[0] * depth + "1" + pair[1] * depth
        with pytest.raises(ArtifactError, match="file: expected one strict JSON document, got nesting too deep; "):
            strict_json.parse(text.encode(), "file", 1 << 20)
    strict_json.parse(b'["' + b"[" * 5000 + b'"]', "file", 1 << 20)  # a text is no nesting


def test_printable() -> None:
    assert strict_json.printable("größer, 東京 👧 \\n") == "größer, 東京 👧 \\n"
    assert strict_json.printable("a\x1b[2J\nb\u202ec\udc80\x07") == "a\ufffd[2J\ufffdb\ufffdc\ufffd\ufffd"
