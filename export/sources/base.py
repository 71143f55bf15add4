"""What SRC names, parsed once: a checkpoint's folder, a GGUF file, the folder of an OpenVINO IR, or a model on the
Hugging Face hub.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dovetail.export.sources.tensors import StoredTensor
from dovetail.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A model as its maker left it, whatever the layout of its files.

    `path` is the folder or the (first) file, for messages and for the libraries that want to read it themselves.
    `config` has the fields of transformers' config.json, `tensors` transformers' names: those of an IR are in its graph
    and those of pickles are read by torch alone, so both have none here. `tokenizer` is the text of a tokenizer.json;
    `special_tokens` are the texts behind names such as `bos_token`. `chat_templates` go by name: `default`, and where
    the checkpoint has more of them, theirs. `allow_pickle`: weights, a draft's too, may be pickles.
    """

    path: Path
    layout: Literal["checkpoint", "gguf", "ir"]
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    tokenizer: str
    generation_config: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    allow_pickle: bool = False

    def sizes(self) -> tuple[int, int]:
        """(vocabulary, hidden size). Raises `UserError` where the config does not say."""
        sizes = self.config.get("vocab_size"), self.config.get("hidden_size")
        if not all(type(size) is int and size > 0 for size in sizes):
            raise UserError(
                f"expected vocab_size and hidden_size in the config of {self.path}, got {sizes}; choose another "
                f"checkpoint"
            )
        return sizes  # type: ignore[return-value]
