"""Every tokenizer is tried before an artifact has it: the runtime reads it, a text comes back as it was, and OpenVINO
GenAI's, written beside the target, gives the same ids.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.export.tokenizers.openvino_tokenizer import NAMES
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text import tokenizer_check
from dovetail.runtime.text.detokenizer import Pieces, TextStream, read_decoder
from dovetail.runtime.text.tokenizer import read_native

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LINES = (
    "The quick brown fox jumps over the lazy dog; it doesn't, we'll see, they've said I'd be late. IT'S DONE!",
    "Voilà l'été à l'ombre, où l'on rêve… Größe, Straße, „so“; niño, jalapeño, ¿verdad? Zażółć gęślą jaźń, ılık",
    "Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ქართული ენა, Հայերեն, ሰላም",
    "今天天气很好，我们去公园散步吧。吾輩は猫である、カタカナｶﾀｶﾅ ＡＢＣ１２３。안녕하세요? 오늘은 날씨가 좋네요.",
    "السلام عليكم ورحمة الله، كيف حالك؟ ١٢٣ שלום עולם, מה שלומך? हिन्दी क्षत्रिय ज्ञान। தமிழ் மொழி สวัสดีครับ ๑๒๓",
    "👍🏽 👨‍👩‍👧‍👦 🇫🇷🇯🇵 ❤️‍🔥 ☕️ 🤷🏻‍♀️ 1️⃣ 😀😂 ✅→ ∑ᵢ xᵢ ≤ ∞, ½·√2, x ∈ ℝⁿ, 10 µm, 25 °C, №5 ™©® 𝒳𝕏 \ue000",
    "1234567890 3.14159 1,000,000.00 2024-02-29T23:59:59Z +1 (555) 010-9999 100% 0x1F 1e-9 7 42 365 2048 Ⅳ ④",
    "e\u0301 cafe\u0301 n\u0303 a\u0323\u0308 \u1100\u1161\u11a8 \u0915\u094d\u0937 o\u200db \u200e\u00ad\ufeffx",
    "def parse(text: str, *, strict=False) -> list[int]:\n    return [int(x) for x in text.split(',') if x]  # don't",
    '\tif err != nil {\n\t\treturn fmt.Errorf("open %q: %w", path, err)\n\t}\n\n\n}\r\n#include <stdio.h>\r\n\r\nx',
    '<div class="row"><p>Hello &amp; welcome</p><br/></div><!-- end --> {"id": [1, -0.5e-10, null]} a[i]+=b*2;;',
    "https://example.org/a/b?query=1&lang=en#s-2 user.name+tag@mail.example.com C:\\dir\\file.txt ~/x $HOME `ls`",
    "a  b   c    d     e      f       g        h         i                              x\t\t\ty \t z \n w\n\n\n\n\nv",
    "x\u00a0y\u3000z\u2009w\u200bv\u2028u\u0085t\x0bs\x0cr\u1680q --------- ======== ****** ......... ______ !!!!!!!!",
    "CamelCase snake_case kebab-case SCREAMING_CASE HTTPServer2 x86_64 mixedUP wOrD iPhone15Pro aaaaaaaaaa hahahaha",
)
_PER_LINE = 40  # control tokens


def check_tokenizers(tokenizer: str, folder: Path) -> None:
    """Raise `UserError`, with the text, where the text of a tokenizer.json can't be run, or loses text, or where the
    OpenVINO tokenizer in `folder` (if there is one) gives other ids or another text.
    """
    document = json.loads(tokenizer)
    try:
        native = read_native(document)
    except ArtifactError as error:
        raise UserError(str(error)) from None
    native.encode_special_tokens = False
    lines = [*_LINES, *_with_added_tokens(document["added_tokens"])]
    ids: list[list[int]] = [encoding.ids for encoding in native.encode_batch(lines)]
    _check_round_trips(document, native)
    if (folder / f"{NAMES[0]}.xml").is_file():
        _check_openvino(native, lines, ids, folder)


def _with_added_tokens(added: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines with all of them, between letters, spaces, and side by side."""
    between = ("a", " ", "", " b ", "\n")
    tokens = [token["content"] for token in added]
    for begin in range(0, len(tokens), _PER_LINE):
        row = tokens[begin : begin + _PER_LINE]
        yield "".join(between[i % len(between)] + token for i, token in enumerate(row)) + "c"


def _check_round_trips(document: Mapping[str, Any], native: Tokenizer) -> None:
    """Text -> ids -> text, whole and as the runtime streams it. Not for lines of which the vocabulary lacks something,
    and but for what a normalizer is there to change.
    """
    unknown = tokenizer_check.unknown_id(document["model"])
    special = frozenset(token["id"] for token in document["added_tokens"] if token["special"])
    pieces = Pieces(read_decoder(document["decoder"]), native.id_to_token)
    for line in _LINES:
        ids = native.encode(line, add_special_tokens=False).ids
        if unknown in ids:
            continue
        text, expected = native.decode(ids), _normalized(document, line)
        if text != expected:
            raise UserError(
                f"expected a tokenizer that gives a text back, got {text!r} for {expected!r}; give the model's own "
                f"tokenizer.json"
            )
        stream = TextStream(pieces, special)
        streamed = "".join(stream.push([token]) for token in ids) + stream.finish()
        if streamed != text:
            raise UserError(
                f"expected a decoder that the runtime follows token by token, got {streamed!r} for {text!r}; give the "
                f"model's own tokenizer.json"
            )


def _normalized(document: Mapping[str, Any], line: str) -> str:
    """`line` as Unicode forms and cases are changed on purpose; signs for spaces are undone by the decoder."""
    from tokenizers import normalizers

    part = document["normalizer"]
    parts = part["normalizers"] if part and part["type"] == "Sequence" else [part] if part else []
    for step in parts:
        if step["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"):
            line = getattr(normalizers, step["type"])().normalize_str(line)
    return line


@functools.cache
def _core_with_tokenizers() -> Any:
    """Kept, as `openvino_core` is, which may have been made before it could know the tokenizers' operators."""
    import openvino as ov
    import openvino_tokenizers

    assert openvino_tokenizers.is_openvino_tokenizers_compatible  # its import adds them to every later Core
    return ov.Core()


def _check_openvino(native: Tokenizer, lines: Sequence[str], ids: Sequence[Sequence[int]], folder: Path) -> None:
    core = _core_with_tokenizers()
    encoder, decoder = (core.compile_model(folder / f"{name}.xml", "CPU") for name in NAMES)
    for line, row in zip(lines, ids, strict=True):
        theirs = encoder([line])["input_ids"][0].tolist()
        if theirs != list(row):
            raise UserError(
                f"expected the tokenizer for OpenVINO GenAI to give the same ids, got {_first(theirs, row)} for "
                f"{line!r}; this tokenizer can't be exported"
            )
        text = str(decoder([np.array([row], np.int64)])["string_output"][0])
        if row and text != native.decode(row):
            raise UserError(
                f"expected the detokenizer for OpenVINO GenAI to give the same text, got {text!r} for "
                f"{native.decode(row)!r}; this tokenizer can't be exported"
            )


def _first(theirs: Sequence[int], ours: Sequence[int]) -> str:
    """Where two lists part."""
    place = next((i for i, (one, other) in enumerate(zip(theirs, ours, strict=False)) if one != other), len(ours))
    return f"{theirs[place : place + 4]} and not {list(ours[place : place + 4])} from id {place} on"
