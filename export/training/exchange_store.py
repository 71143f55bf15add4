"""Exchanges on disk, one JSON object a line, in the order they were made. A run that was stopped goes on behind the
last whole line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.exchanges import Exchange, FirstTurn


class ExchangeStore:
    """The file `path`, which is made if it is not there."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.exchanges: list[Exchange] = list(_read(path))
        self._answered = {(exchange.question, exchange.temperature) for exchange in self.exchanges}

    def has(self, question: FirstTurn, temperature: float) -> bool:
        """Whether this answer is there already; not where another text stands at the question's place by now."""
        return (question, temperature) in self._answered

    def add(self, exchange: Exchange) -> None:
        """Append it, to the file too. Raises `UserError` on a full disk; what was there stays."""
        line = json.dumps(
            {
                "source": exchange.question.source,
                "question": exchange.question.text,
                "temperature": exchange.temperature,
                "prompt_tokens": exchange.prompt_tokens,
                "answer_tokens": exchange.answer_tokens,
            }
        )
        try:
            with self._path.open("ab") as file:
                file.write(line.encode() + b"\n")
        except OSError as error:
            raise UserError(
                f"expected room for an answer in {self._path}, got: {error.strerror}; free some space and run the same "
                f"command"
            ) from None
        self.exchanges.append(exchange)
        self._answered.add((exchange.question, exchange.temperature))


def _read(path: Path) -> Iterator[Exchange]:
    """The exchanges of the file; the rest of a line that a killed run left behind is cut off."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            yield _exchange(line, f"{path}, line {number}")
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)


def _exchange(line: bytes, where: str) -> Exchange:
    try:
        entry: dict[str, Any] = json.loads(line)
        return Exchange(
            FirstTurn(entry["source"], entry["question"]),
            float(entry["temperature"]),
            tuple(map(int, entry["prompt_tokens"])),
            tuple(map(int, entry["answer_tokens"])),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{where}: expected an answer made by this command, got {error!r:.80}; remove the line"
        ) from None
