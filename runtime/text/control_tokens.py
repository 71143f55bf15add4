"""Which added tokens of a `tokenizer.json` control the model, so that nobody may write them by writing their text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_HTML = re.compile(
    r"</?(a|b|blockquote|body|br|caption|code|div|em|h[1-6]|head|hr|html|i|img|li|ol|p|pre|span|strong|sub|sup|table"
    r"|tbody|td|tfoot|th|thead|tr|u|ul) ?/?>"
)


def is_control(token: Mapping[str, Any]) -> bool:
    """Whether the added token is more than a piece of text that happens to be one token.

    That are those marked as special, and of the others those that look like a mark: <think>, [TOOL], <|fim_prefix|>.
    Runs of blanks (Phi, Gemma), single letters (DeepSeek) and HTML (Gemma) are text, and people write them as such.
    """
    text = token["content"]
    is_mark = len(text) > 2 and _is_sign(text[0]) and _is_sign(text[-1]) and any(map(str.isalnum, text))
    return token["special"] or (is_mark and _HTML.fullmatch(text) is None)


def _is_sign(char: str) -> bool:
    return not char.isalnum() and not char.isspace() and char != "▁"
