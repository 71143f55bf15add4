"""Text to token ids, as transformers has them, but for control tokens that people wrote: these are spelled out.

The native library reads the whole text, because what it makes of a part goes by what is around it: added tokens that
swallow blanks, blanks that SentencePiece puts in front. Only where it found a control token that is not meant as one,
the text is read again by a copy that knows control tokens under secret names alone, which stand in the text for those
that are meant:

    text      <|user|>\nWhat is </s>?<|end|>           who wrote </s>: the user
    again     {secret 7}\nWhat is </s>?{secret 9}      and </s> is any text
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.artifact.manifest import TOKENIZER
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text import tokenizer_check as tokenizer_file
from dovetail.runtime.text.control_tokens import is_control
from dovetail.runtime.text.owned_text import ASSISTANT, CALLER

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")


class Encoder:
    """One tokenizer's. Safe for several threads."""

    def __init__(self, document: dict[str, Any], native: tokenizers.Tokenizer) -> None:
        """`document`: the checked `tokenizer.json` that `native` was made from."""
        self._native = native
        self._unknown_id = tokenizer_file.unknown_id(document["model"])
        self._control = {token["id"]: token for token in document["added_tokens"] if is_control(token)}

    @property
    def control_tokens(self) -> list[str]:
        """Their texts."""
        return [token["content"] for token in self._control.values()]

    @cached_property
    def front(self) -> list[int]:
        """What the tokenizer puts before a text."""
        encoding = _encoded(self._native, "a", True)
        added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [token_id for token_id, _ in itertools.takewhile(lambda one: one[1], added)]

    def encode(self, text: str, owners: bytes, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`, which was written by `owners`, one a character (see `owned_text.py`).

        A control token counts where the template wrote all of it. In what an assistant said those count that are not
        marked as special, which it may have written as such. `add_special_tokens` adds what the tokenizer puts around
        a text. Raises `UserError` for a control token that has to be spelled out and can't be.
        """
        encoding = _encoded(self._native, text, add_special_tokens)
        ids: list[int] = encoding.ids
        if self._control.keys().isdisjoint(ids):
            return ids
        meant, others = [], False
        for token_id, span, added in zip(ids, encoding.offsets, encoding.special_tokens_mask, strict=True):
            if token_id not in self._control or added:
                continue
            start, end = self._place(token_id, text, *span)
            if self._is_meant(token_id, owners[start:end]):
                meant.append((start, end, token_id))
            elif token_id != self._unknown_id or text[start:end] == self._control[token_id]["content"]:
                others = True
        return self._spelled(text, meant, add_special_tokens) if others else ids

    def _place(self, token_id: int, text: str, start: int, end: int) -> tuple[int, int]:
        """Where the token itself lies between `start` and `end`, which hold the blanks that it swallows, too."""
        content = self._control[token_id]["content"]
        at = text.find(content, start, end)
        return (start, end) if at < 0 else (at, at + len(content))

    def _is_meant(self, token_id: int, owners: bytes) -> bool:
        return CALLER not in owners and not (ASSISTANT in owners and self._control[token_id]["special"])

    def _spelled(self, text: str, meant: list[tuple[int, int, int]], add_special_tokens: bool) -> list[int]:
        """Token ids of `text` with no control tokens but the `meant` ones: (start, end, id) each."""
        parts, at = [], 0
        for start, end, token_id in meant:
            parts += [text[at:start], self._secret(token_id)]
            at = end
        secret_text = "".join([*parts, text[at:]])
        for native in (self._by_secrets, self._by_plain_secrets):
            encoding = _encoded(native, secret_text, add_special_tokens)
            secret = [at for at, (start, end) in enumerate(encoding.offsets) if self._nonce in secret_text[start:end]]
            if len(secret) == len(meant):
                break
        ids: list[int] = encoding.ids
        for token_id, added in zip(ids, encoding.special_tokens_mask, strict=True):
            if token_id in self._control and not added and token_id != self._unknown_id:
                control = strict_json.shown(
                    self._native.id_to_token(token_id)
                )  # the model has it as a plain piece, too
                raise UserError(f"expected text, got the control token {control} in it; take it out of the text")
        for at, (_, _, token_id) in zip(secret, meant, strict=True):
            ids[at] = token_id
        return ids

    @cached_property
    def _nonce(self) -> str:
        return secrets.token_hex(8)

    def _secret(self, token_id: int) -> str:
        return f"\ufdd0{self._nonce}.{token_id}\ufdd1"  # code points that Unicode keeps out of text

    @cached_property
    def _by_secrets(self) -> tokenizers.Tokenizer:
        return self._with_secrets(lambda token: bool(token["normalized"]))

    @cached_property
    def _by_plain_secrets(self) -> tokenizers.Tokenizer:
        """For a tokenizer that looks for its control tokens behind a normalizer which changes them as well: it finds
        them in some places only, and may miss one now that those around it are text."""
        return self._with_secrets(lambda token: False)

    def _with_secrets(self, is_normalized: Callable[[dict[str, Any]], bool]) -> tokenizers.Tokenizer:
        """A copy that takes control tokens for text, and has tokens with secret names in their place."""
        import tokenizers

        document = json.loads(self._native.to_str())
        for token in document["added_tokens"]:
            token["special"] = token["id"] in self._control
        native = tokenizers.Tokenizer.from_str(json.dumps(document))
        native.encode_special_tokens = True
        native.add_tokens(
            [
                tokenizers.AddedToken(
                    self._secret(token_id),
                    lstrip=token["lstrip"],
                    rstrip=token["rstrip"],
                    normalized=is_normalized(token),
                    special=False,
                )
                for token_id, token in self._control.items()
            ]
        )
        return native


def _encoded(native: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
    # encode() would hold the interpreter lock all the while, encode_batch does not
    return natively(lambda: native.encode_batch([text], add_special_tokens=add_special_tokens))[0]


def natively(call: Callable[[], T]) -> T:
    """Run a call of the native library; its errors and panics (not an `Exception`) are the tokenizer file's fault."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ArtifactError(
                f"{TOKENIZER}: expected a sound tokenizer, got {str(error)[:160]!r}; export the artifact again"
            ) from None
        raise
