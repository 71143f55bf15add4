"""Text that knows who wrote each of its characters, while a chat template cuts and joins it.

A template mixes its own marks with the words of people, and only the marks may become control tokens. So every text
that goes into a template is an `OwnedText`, whose methods keep the owners beside the characters:

    "<|user|>" + OwnedText("hi</s>").strip()     text    <|user|>hi</s>
                                                 owners  00000000111111

Prior art: the input marking of llama.cpp's jinja engine (common/jinja).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

TEMPLATE, CALLER, ASSISTANT = 0, 1, 2
"""Who wrote a character: the chat template, the caller's values, or of these what an assistant said."""


class OwnedText(str):
    """A str in all that it answers. What its methods return is owned too, so nobody's words become the template's."""

    _owners: bytes  # one a character

    def __new__(cls, text: str, owners: bytes | None = None) -> OwnedText:
        """Without `owners` all of it is the caller's."""
        made = super().__new__(cls, text)
        made._owners = bytes([CALLER]) * len(text) if owners is None else owners
        assert len(made._owners) == len(text)
        return made

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> OwnedText:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> OwnedText:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> OwnedText:
        return OwnedText(super().__mul__(count), self._owners * count)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> OwnedText:
        text = super().__getitem__(key)
        if isinstance(key, slice):
            return OwnedText(text, self._owners[key])
        return OwnedText(text, bytes([self._owners[key]]))

    def __iter__(self) -> Iterator[str]:
        return (self[at] for at in range(len(self)))

    def join(self, parts: Iterable[str]) -> OwnedText:
        """See str."""
        separated: list[str] = []
        for part in parts:
            separated += [self, part]
        return joined(separated[1:])

    def strip(self, chars: str | None = None) -> OwnedText:
        """See str."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> OwnedText:
        """See str."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> OwnedText:
        """See str."""
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> OwnedText:
        """See str."""
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> OwnedText:
        """See str."""
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """See str."""
        return self._pieces(super().split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """See str."""
        return self._pieces(super().rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        """See str."""
        whole = self._pieces(super().splitlines(keepends=True), 0)
        return (
            whole if keepends else [line[: len(text)] for line, text in zip(whole, super().splitlines(), strict=True)]
        )

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """See str."""
        before, found, after = self._pieces(super().partition(sep), 0)
        return before, found, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """See str."""
        before, found, after = self._pieces(super().rpartition(sep), 0)
        return before, found, after

    def replace(self, old: str, new: str, /, count: SupportsIndex = -1) -> OwnedText:
        """See str."""
        return owned(new).join(self.split(old, count)) if old else self._reshaped(super().replace(old, new, count))

    def upper(self) -> OwnedText:
        """See str."""
        return self._reshaped(super().upper())

    def lower(self) -> OwnedText:
        """See str."""
        return self._reshaped(super().lower())

    def title(self) -> OwnedText:
        """See str."""
        return self._reshaped(super().title())

    def capitalize(self) -> OwnedText:
        """See str."""
        return self._reshaped(super().capitalize())

    def swapcase(self) -> OwnedText:
        """See str."""
        return self._reshaped(super().swapcase())

    def casefold(self) -> OwnedText:
        """See str."""
        return self._reshaped(super().casefold())

    def center(self, width: SupportsIndex, fillchar: str = " ", /) -> OwnedText:
        """See str."""
        return self._reshaped(super().center(width, fillchar))

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> OwnedText:
        """See str."""
        return self._reshaped(super().ljust(width, fillchar))

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> OwnedText:
        """See str."""
        return self._reshaped(super().rjust(width, fillchar))

    def zfill(self, width: SupportsIndex, /) -> OwnedText:
        """See str."""
        return self._reshaped(super().zfill(width))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> OwnedText:
        """See str."""
        return self._reshaped(super().expandtabs(tabsize))

    def translate(self, table: Any, /) -> OwnedText:
        """See str."""
        return self._reshaped(super().translate(table))

    def _pieces(self, texts: Iterable[str], gap: int) -> list[str]:
        """The parts `texts` of this text, which lie in this order, `gap` characters or some blanks between two."""
        parts: list[str] = []
        at = 0
        for text in texts:
            at = self.find(text, at)
            parts.append(self[at : at + len(text)])
            at += len(text) + gap
        return parts

    def _reshaped(self, text: str) -> OwnedText:
        """What a method made of the whole: character by character, or padded. Of what can't be told apart nothing is
        the template's, unless all was."""
        if len(text) == len(self):
            return OwnedText(text, self._owners)
        if (at := text.find(self)) >= 0:
            padding = bytes([TEMPLATE])
            return OwnedText(text, padding * at + self._owners + padding * (len(text) - len(self) - at))
        return OwnedText(text, bytes([CALLER if any(self._owners) else TEMPLATE]) * len(text))


def owned(text: str) -> OwnedText:
    """`text` itself; a plain one is the template's."""
    return text if isinstance(text, OwnedText) else OwnedText(text, bytes([TEMPLATE]) * len(text))


def owners_of(text: str) -> bytes:
    """Who wrote each character."""
    return owned(text)._owners


def joined(texts: Sequence[str]) -> OwnedText:
    """One text of several; plain ones are the template's."""
    return OwnedText("".join(texts), b"".join(map(owners_of, texts)))


def owned_by(value: Any, owner: int) -> Any:
    """JSON's `value`, every text in it that of `owner`, keys too."""
    if isinstance(value, str):
        return OwnedText(value, bytes([owner]) * len(value))
    if isinstance(value, Mapping):
        return {owned_by(key, owner): owned_by(item, owner) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [owned_by(item, owner) for item in value]
    return value


def texts_in(value: Any) -> Iterator[str]:
    """All texts of a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_in(item)


def owned_by_search(text: str, sources: Any, control_tokens: Iterable[str]) -> str:
    """A `text` that was made of `sources` in some way that can't be followed.

    It is the caller's but for control tokens that only the template's parts of the sources hold. If all of those are
    the template's, so is the text, and it stays a plain one.
    """
    parts = list(texts_in(sources))
    if not any(any(owners_of(part)) for part in parts):
        return text
    owners = bytearray([CALLER]) * len(text)
    for token in control_tokens:
        if token not in text or not _is_the_templates(token, parts):
            continue
        at = text.find(token)
        while at >= 0:
            owners[at : at + len(token)] = bytes([TEMPLATE]) * len(token)
            at = text.find(token, at + len(token))
    return OwnedText(str.__str__(text), bytes(owners))


def _is_the_templates(token: str, parts: Sequence[str]) -> bool:
    is_there = False
    for part in parts:
        owners, at = owners_of(part), part.find(token)
        while at >= 0:
            if any(owners[at : at + len(token)]):
                return False
            is_there = True
            at = part.find(token, at + 1)
    return is_there
