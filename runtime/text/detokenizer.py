"""Tokens back to text as they come: never a broken character, nothing taken back, the same cost for every token.

The native library decodes whole lists only. A tokenizer's decoder is one of three shapes, each simple enough to run
one token at a time:

- byte level: tokens spell bytes, the text is their UTF-8;
- metaspace: a marker stands for a space, and is dropped from the first token;
- fused: literal replacements, `<0xNN>` tokens spelling bytes, then perhaps a leading space dropped from the whole text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.runtime.errors import ArtifactError

_BYTE_TOKEN = re.compile(
    r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>"
)  # the plus is what the library's number parser lets pass
_REPLACEMENT = "\ufffd"


def _byte_alphabet() -> dict[str, int]:
    """The printable character that GPT-2 and its heirs write for each byte: the same if it prints, else 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True, slots=True)
class Decoder:
    """What turns tokens into text. `metaspace`: the marker, "" for none. `lead`: what a text loses at its start,
    `lead_count` times at most."""

    byte_level: bool = False
    metaspace: str = ""
    metaspace_drops_first: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    lead: str = ""
    lead_count: int = 0


def read_decoder(document: dict[str, Any]) -> Decoder:
    """The decoder of a `tokenizer.json`, whose fields were checked before. Raises `ArtifactError` for another shape."""
    steps = _flattened(document)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Decoder(byte_level=True)
    if kinds == ["Metaspace"]:
        scheme = steps[0].get("prepend_scheme", "always" if steps[0].get("add_prefix_space", True) else "never")
        return Decoder(metaspace=steps[0]["replacement"], metaspace_drops_first=scheme != "never")
    if not re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?", "".join(f"{kind} " for kind in kinds)):
        raise ArtifactError(
            f"tokenizer.json decoder: expected ByteLevel, Metaspace, or Replace, ByteFallback, Fuse, Strip in order, "
            f"got {', '.join(kinds)}; export again with a tokenizer of a supported kind"
        )
    strip = steps[-1] if kinds and kinds[-1] == "Strip" else {}
    return Decoder(
        replacements=tuple((step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"),
        byte_fallback="ByteFallback" in kinds,
        lead=strip.get("content", ""),
        lead_count=strip.get("start", 0),
    )


def _flattened(component: dict[str, Any]) -> list[dict[str, Any]]:
    if component["type"] != "Sequence":
        return [component]
    return [step for inner in component["decoders"] for step in _flattened(inner)]


class Pieces:
    """What each token id adds to a text: bytes, or characters, or nothing (None); worked out once per id."""

    def __init__(self, decoder: Decoder, token_of: Callable[[int], str | None]) -> None:
        self.decoder = decoder
        self._token_of = token_of
        self._alphabet = _byte_alphabet() if decoder.byte_level else {}
        self._known: dict[int, str | bytes | None] = {}

    def __getitem__(self, token_id: int) -> str | bytes | None:
        if token_id not in self._known:
            self._known[token_id] = self._piece(self._token_of(token_id))
        return self._known[token_id]

    def first(self, token_id: int) -> str | bytes | None:
        """The same for a text's first token."""
        token = self._token_of(token_id)
        if token is not None and self.decoder.metaspace_drops_first:
            return token.replace(self.decoder.metaspace, "")
        return self[token_id]

    def _piece(self, token: str | None) -> str | bytes | None:
        if token is None:
            return None
        if self.decoder.byte_level:
            spelled = [self._alphabet.get(char) for char in token]
            return token.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)
        if self.decoder.metaspace:
            return token.replace(self.decoder.metaspace, " ")
        for old, new in self.decoder.replacements:
            token = token.replace(old, new)
        spelled_byte = _BYTE_TOKEN.fullmatch(token) if self.decoder.byte_fallback else None
        return token if spelled_byte is None else bytes([int(spelled_byte[1], 16)])


class TextStream:
    """The text of one answer while its tokens arrive: what `push` and `finish` return, joined, is the decoded one.

    Bytes of an unfinished character wait for the next token. A run of `<0xNN>` tokens waits for its end, because by
    the library's rule one bad byte spoils the whole run.
    """

    def __init__(self, pieces: Pieces, skipped: frozenset[int], starts: bool = True) -> None:
        """`skipped`: ids that leave no text (the special tokens). `starts`: no text stands before this one."""
        self._pieces = pieces
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()
        self._lead_left = pieces.decoder.lead_count if starts else 0
        self._started = not starts

    def push(self, ids: Sequence[int]) -> str:
        """The text that can be shown now that `ids` have arrived; often less than they spell, never more."""
        parts = []
        for token_id in ids:
            if token_id in self._skipped:
                continue
            piece = self._pieces[token_id] if self._started else self._pieces.first(token_id)
            if piece is None:
                continue
            self._started = True
            if isinstance(piece, str):
                parts.append(self._end_of_run())
                parts.append(piece)
            elif self._pieces.decoder.byte_level:
                parts.append(self._utf8.decode(piece))
            else:
                self._run += piece
        return self._without_lead("".join(parts))

    def finish(self) -> str:
        """The rest: what waited, with U+FFFD for bytes that never became a character."""
        return self._without_lead(self._utf8.decode(b"", final=True) + self._end_of_run())

    def _end_of_run(self) -> str:
        if not self._run:
            return ""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _without_lead(self, text: str) -> str:
        while self._lead_left and text:
            if text[0] != self._pieces.decoder.lead:
                self._lead_left = 0
            else:
                self._lead_left -= 1
                text = text[1:]
        return text
