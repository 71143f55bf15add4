"""Text to tokens and back: a tokenizer read with care from an artifact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.artifact.manifest import TOKENIZER
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.errors import ArtifactError, ContextOverflowError, UserError
from dovetail.runtime.sampling.config import GenerationConfig, load_generation_config
from dovetail.runtime.text import tokenizer_check as tokenizer_file
from dovetail.runtime.text.detokenizer import Pieces, TextStream, read_decoder
from dovetail.runtime.text.encoder import Encoder, natively
from dovetail.runtime.text.owned_text import CALLER, TEMPLATE

if TYPE_CHECKING:
    import tokenizers

MAX_TEXT_BYTES = 8 << 20  # what one tokenization may cost: the library needs seconds for a megabyte of some texts
_BYTES_PER_TOKEN = 128  # no real text has longer tokens on average, so more bytes than this times the context can't fit


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
        self._encoder = Encoder(document, native)
        self._target_vocab_size = target_vocab_size
        self._max_text_bytes = max_text_bytes
        self._special_ids = frozenset(token["id"] for token in document["added_tokens"] if token["special"])
        self._pieces = Pieces(read_decoder(document["decoder"]), native.id_to_token)
        self.generation = generation
        self.eos_token_ids = generation.eos_token_id
        self.vocab_size: int = native.get_vocab_size(with_added_tokens=True)

    @property
    def control_tokens(self) -> list[str]:
        """The texts of the tokens that are no text, see `is_control`."""
        return self._encoder.control_tokens

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`. `add_special_tokens` adds what the tokenizer puts around a text.

        Control tokens in it are plain text, unless `parse_special` says that they are meant, as in a prompt that a
        chat template made; what the tokenizer puts in front is then not put there twice. Raises
        `ContextOverflowError` for a text too long to be tried, `UserError` for one that is not text.
        """
        owners = bytes([TEMPLATE if parse_special else CALLER]) * len(text)
        ids = self.encode_owned(text, owners, add_special_tokens)
        front = self._encoder.front if add_special_tokens else []
        is_twice = parse_special and front and ids[len(front) : 2 * len(front)] == front
        return ids[len(front) :] if is_twice else ids

    def encode_owned(self, text: str, owners: bytes, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text by several `owners`, see `Encoder.encode`. Raises as `encode` does."""
        self._check_text(text)
        ids = self._encoder.encode(text, owners, add_special_tokens)
        if ids and max(ids) >= self._target_vocab_size:  # some checkpoints add tokens that their weights don't know
            name = strict_json.shown(self._native.id_to_token(max(ids)))
            raise UserError(
                f"expected token ids below the target's vocabulary of {self._target_vocab_size}, got {max(ids)} for "
                f"{name}; take that token out of the text"
            )
        return ids

    def _check_text(self, text: str) -> None:
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

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that make no character become U+FFFD."""
        text: str = natively(lambda: self._native.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return text

    def token_text(self, token_id: int) -> str:
        """What the token spells in the middle of a text, a special one too."""
        stream = TextStream(self._pieces, frozenset(), starts=False)
        return stream.push([token_id]) + stream.finish()

    def skipped_text(self, token_id: int) -> str:
        """What the token would spell if `skip_special_tokens` did not leave it out; "" for one that it keeps."""
        return self.token_text(token_id) if token_id in self._special_ids else ""

    def stream(self, skip_special_tokens: bool = True, behind: Iterable[int] = ()) -> TextStream:
        """A fresh stream, for showing an answer while it is made; in the end it has shown what `decode` returns.

        It is what the answer adds to `behind`, the tokens before it: what a tokenizer drops at the start of a text
        (a space, as in Llama 2) is dropped only where there is none before.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        starts = not any(token not in skipped and self._pieces[token] for token in behind)
        return TextStream(self._pieces, skipped, starts)


def load_tokenizer(artifact: Artifact) -> Tokenizer:
    """Check `tokenizer.json` and its companion, then hand it to the native library. Raises `ArtifactError`."""
    entry = artifact.manifest.files[TOKENIZER]
    limit = tokenizer_file.MAX_TOKENIZER_BYTES
    if entry.bytes > limit:
        raise ArtifactError(
            f"{TOKENIZER}: expected at most {limit} bytes, got {entry.bytes}; export the artifact again"
        )
    document = strict_json.parse(artifact.file(TOKENIZER).read_bytes(), TOKENIZER, limit)
    generation = load_generation_config(artifact)  # before a native library sees anything of the artifact
    native = read_native(document)
    max_text_bytes = min(MAX_TEXT_BYTES, max(1 << 18, _BYTES_PER_TOKEN * artifact.manifest.target.context_length))
    return Tokenizer(document, native, generation, artifact.manifest.target.vocab_size, max_text_bytes)


def read_native(document: dict[str, Any]) -> tokenizers.Tokenizer:
    """The native library's tokenizer of a parsed `tokenizer.json`, which is checked first. Raises `ArtifactError` for a
    file that the runtime does not read.

    `truncation` and `padding` are dropped, not refused: many published files carry them, they say how a training
    batch was made, and a prompt is never cut or filled here.
    """
    tokenizer_file.check(document)
    read_decoder(document["decoder"])
    import tokenizers  # not before the file is known to be sound

    text = json.dumps(document | {"truncation": None, "padding": None})
    native = natively(lambda: tokenizers.Tokenizer.from_str(text))
    for token in document["added_tokens"]:
        if native.token_to_id(token["content"]) != token["id"]:
            got = f"{native.token_to_id(token['content'])} for {strict_json.shown(token['content'])}"
            raise ArtifactError(
                f"{TOKENIZER}: expected the added token's id {token['id']}, got {got}; export the artifact again"
            )
    return native
