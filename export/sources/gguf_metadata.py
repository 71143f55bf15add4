"""The named values of a GGUF file, asked for by name and type: what is missing or of another type is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.runtime.errors import UserError

_Given = int | float | str | bool


class Metadata:
    """`values` by name, of the file `path`. A name that begins with a dot stands for the architecture's own, as
    `.block_count` for `llama.block_count`.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self._values, self.path = values, path
        self.architecture = self.text("general.architecture")

    def __contains__(self, name: str) -> bool:
        return self.name(name) in self._values

    def name(self, name: str) -> str:
        """Its name in the file."""
        return self.architecture + name if name.startswith(".") else name

    def get(self, name: str) -> Any:
        """The value as it is; None where there is none."""
        return self._values.get(self.name(name))

    def size(self, name: str, default: int | None = None, limit: int = (1 << 31) - 1) -> int:
        """A positive whole number up to `limit`; some files have one a layer, which must be the same."""
        value = self._or(name, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or not 0 < value <= limit:
            raise self.wrong(name, f"a whole number from 1 to {limit}", value)
        return value

    def index(self, name: str, limit: int) -> int | None:
        """A number below `limit`, as an id is; None where there is none."""
        value = self.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < limit):
            raise self.wrong(name, f"a number below {limit}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number: the shortest one that its float32 stands for, so 1e-05 and not 9.999999747378752e-06."""
        value = self._or(name, default)
        if type(value) not in (int, float) or not np.isfinite(value):
            raise self.wrong(name, "a number", value)
        return float(str(np.float32(value)))

    def flag(self, name: str, default: bool) -> bool:
        """Whether it is set."""
        value = self._or(name, default)
        if type(value) is not bool:
            raise self.wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A text."""
        value = self._or(name, default)
        if type(value) is not str:
            raise self.wrong(name, "a text", value)
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        value = self._or(name, None)
        if not isinstance(value, list):
            raise self.wrong(name, "a list of texts", value)
        return value

    def numbers(self, name: str, count: int) -> list[int | float]:
        """A list of `count` numbers."""
        value = self._or(name, None)
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise self.wrong(name, f"{count} numbers", value)
        numbers: list[int | float] = value.tolist()
        return numbers

    def wrong(self, name: str, expected: str, got: Any) -> UserError:
        """What is raised where a value is not as it must be."""
        shown = "none" if got is None else f"{len(got)} values" if isinstance(got, (list, np.ndarray)) else repr(got)
        return UserError(f"expected {self.name(name)} as {expected} in {self.path}, got {shown[:80]}; convert it again")

    def _or(self, name: str, default: _Given | None) -> Any:
        value = self.get(name)
        return default if value is None else value
