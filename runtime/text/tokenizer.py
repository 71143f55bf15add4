"""Text to tokens and back: a tokenizer read with care from an artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.artifact.manifest import TOKENIZER
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.errors import ArtifactError, ContextOverflowError, UserError
from dovetail.runtime.sampling.config import GenerationConfig, load_generation_config
from dovetail.runtime.text import tokenizer_check as tokenizer_file
from dovetail.runtime.text.detokenizer import Pieces, TextStream, read_decoder

if TYPE_CHECKING:
    import tokenizers

MAX_TEXT_BYTES = 8 << 20  # what one tokenization may cost: the library needs seconds for a megabyte of some texts
_BYTES_PER_TOKEN = 128  # no real text has longer tokens on average, so more bytes than this times the context can't fit

GUARD = "\ufdd0"  # a code point that Unicode keeps out of text, put into control tokens that are not meant as such

T = TypeVar("T")


class Tokenizer:
    """One artifact's tokenizer. `eos_token_ids` and `generation` come from its `generation_config.json`."""

    def __init__(
        self,
        document: dict[str, Any],
        native: tokenizers.Tokenizer,
        generation: GenerationConfig,
        target_vocab_size: int,
        max_text_bytes: int,
    ) -> None:
        """`document`: the checked `tokenizer.json` that `native` was made from."""
        self._native = native
        self._target_vocab_size = target_vocab_size
        self._max_text_bytes = max_text_bytes
        self._special_ids = frozenset(token["id"] for token in document["added_tokens"] if token["special"])
        self._control_ids = self._special_ids - {tokenizer_file.unknown_id(document["model"])}
        self._pieces = Pieces(read_decoder(document["decoder"]), native.id_to_token)
        self.generation = generation
        self.eos_token_ids = generation.eos_token_id
        self._control_tokens = frozenset(token["content"] for token in document["added_tokens"])
        self.vocab_size: int = native.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, in which control tokens are plain text; `add_special_tokens` adds what the tokenizer
        puts around a text.

        Raises `ContextOverflowError` for a text too long to be tried, `UserError` for one that is not text.
        """
        return self._checked(self._encoded(self._native, text, add_special_tokens))

    def _encoded(self, native: tokenizers.Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UserError(
                "expected text in UTF-8, got a stray byte or half a character at position "
                f"{error.start}; check the input's encoding"
            ) from None
        if size > self._max_text_bytes:
            raise ContextOverflowError(
                f"expected at most {self._max_text_bytes} bytes of text (more can't fit the context), got {size}; "
                "shorten the prompt"
            )
        if "\0" in text:
            raise UserError(
                f"expected text, got a NUL character at position {text.index(chr(0))}; is the prompt a binary file?"
            )
        # encode() would hold the interpreter lock all the while, encode_batch does not
        encoding = _natively(lambda: native.encode_batch([text], add_special_tokens=add_special_tokens))[0]
        ids: list[int] = encoding.ids
        if native is self._native:
            own = (i for i, added in zip(ids, encoding.special_tokens_mask, strict=True) if not added)
            if tokens := self._control_ids.intersection(own):  # a Unigram model knows them as plain pieces too
                control = strict_json.shown(native.id_to_token(min(tokens)))
                raise UserError(f"expected text, got the control token {control} in it; take it out of the text")
        return ids

    def _checked(self, ids: list[int]) -> list[int]:
        """`ids`, unless the target lacks one: some checkpoints add tokens that their weights don't know."""
        if ids and max(ids) >= self._target_vocab_size:
            name = strict_json.shown(self._native.id_to_token(max(ids)))
            raise UserError(
                f"expected token ids below the target's vocabulary of {self._target_vocab_size}, got {max(ids)} for "
                f"{name}; take that token out of the text"
            )
        return ids

    @cached_property
    def _with_control_tokens(self) -> tokenizers.Tokenizer:
        """The same tokenizer, reading control tokens as such."""
        import tokenizers

        native = tokenizers.Tokenizer.from_str(self._native.to_str())
        native.encode_special_tokens = False
        return native

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template, whose control tokens count, and in which `GUARD` has broken those that
        users wrote: they stay text."""
        if GUARD not in rendered:
            return self._checked(self._encoded(self._with_control_tokens, rendered))
        pattern = "|".join(re.escape(token) for token in sorted(self._control_tokens, key=len, reverse=True))
        ids: list[int] = []
        for part in re.split(f"({pattern})", rendered) if pattern else [rendered]:
            native = self._with_control_tokens if part in self._control_tokens else self._native
            ids += self._encoded(native, part.replace(GUARD, ""))
        return self._checked(ids)

    def guarded(self, value: Any) -> Any:
        """A message or any part of one, with every control token in its texts broken by `GUARD`."""
        if isinstance(value, str):
            for token in self._control_tokens:
                value = value.replace(token, token[0] + GUARD + token[1:])
            return value
        if isinstance(value, Mapping):
            return {key: self.guarded(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.guarded(item) for item in value]
        return value

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that make no character become U+FFFD."""
        text: str = _natively(lambda: self._native.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return text

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A fresh stream, for showing an answer while it is made; in the end it has shown what `decode` returns."""
        return TextStream(self._pieces, self._special_ids if skip_special_tokens else frozenset())


def load_tokenizer(artifact: Artifact) -> Tokenizer:
    """Check `tokenizer.json` and its companion, then hand it to the native library. Raises `ArtifactError`."""
    entry = artifact.manifest.files[TOKENIZER]
    limit = tokenizer_file.MAX_TOKENIZER_BYTES
    if entry.bytes > limit:
        raise ArtifactError(
            f"{TOKENIZER}: expected at most {limit} bytes, got {entry.bytes}; export the artifact again"
        )
    document = strict_json.parse(artifact.file(TOKENIZER).read_bytes(), TOKENIZER, limit)
    native = read_native(document)
    generation = load_generation_config(artifact)
    max_text_bytes = min(MAX_TEXT_BYTES, max(1 << 18, _BYTES_PER_TOKEN * artifact.manifest.target.context_length))
    return Tokenizer(document, native, generation, artifact.manifest.target.vocab_size, max_text_bytes)


def read_native(document: dict[str, Any]) -> tokenizers.Tokenizer:
    """The native library's tokenizer of a parsed `tokenizer.json`, which is checked first; control tokens are plain
    text to it. Raises `ArtifactError` for a file that the runtime does not read.

    `truncation` and `padding` are dropped, not refused: many published files carry them, they say how a training
    batch was made, and a prompt is never cut or filled here.
    """
    import tokenizers

    tokenizer_file.check(document)
    read_decoder(document["decoder"])
    text = json.dumps(document | {"truncation": None, "padding": None})
    native = _natively(lambda: tokenizers.Tokenizer.from_str(text))
    native.encode_special_tokens = True
    for token in document["added_tokens"]:
        if native.token_to_id(token["content"]) != token["id"]:
            got = f"{native.token_to_id(token['content'])} for {strict_json.shown(token['content'])}"
            raise ArtifactError(
                f"{TOKENIZER}: expected the added token's id {token['id']}, got {got}; export the artifact again"
            )
    return native


def _natively(call: Callable[[], T]) -> T:
    """Run a call of the native library; its errors and panics (not an `Exception`) are the tokenizer file's fault."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ArtifactError(
                f"{TOKENIZER}: expected a sound tokenizer, got {str(error)[:160]!r}; export the artifact again"
            ) from None
        raise
