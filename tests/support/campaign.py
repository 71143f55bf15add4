"""How much of the laws' random campaigns is played: a part in every run of the tests, all of it with `--thorough`."""

from __future__ import annotations

is_thorough = False  # set by tests/conftest.py before it collects


def played(part: int, *, of: int) -> int:
    """How many of a campaign's texts, outputs, batches or damages this run plays."""
    return of if is_thorough else part
