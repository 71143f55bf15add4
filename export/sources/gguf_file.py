"""A GGUF file, or several that are one model, as a source: no torch, nothing run, its weights mapped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dovetail.export.sources.base import Source
from dovetail.export.sources.gguf_config import MODEL_TYPES, ROPE_TENSORS, read_config
from dovetail.export.sources.gguf_format import GgufFile, GgufTensor, read_gguf_file
from dovetail.export.sources.gguf_metadata import Metadata
from dovetail.export.sources.gguf_names import as_stored
from dovetail.export.sources.settings import check_attention
from dovetail.export.sources.tensors import StoredTensor
from dovetail.export.target.native.families import read_decoder
from dovetail.export.target.native.tensor_names import check_tensors
from dovetail.export.tokenizers.from_gguf import read_gguf_tokenizer
from dovetail.runtime.errors import UserError

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf\Z", re.DOTALL)
_OTHER_KINDS: Mapping[str, str] = {  # of `general.type`
    "adapter": "a LoRA adapter",
    "mmproj": "a vision projector",
    "vocab": "a vocabulary without weights",
    "imatrix": "an importance matrix",
}
_OTHER_ARCHITECTURES: Mapping[str, str] = {
    "clip": "a vision projector",
    "eagle3": "a draft head without its target (EAGLE-3)",
    "dflash": "a draft head without its target (DFlash)",
    "gemma4-assistant": "a draft head without its target (Gemma 4's)",
}


def read_gguf(path: Path) -> Source:
    """The source in the file `path`; of a model in parts (`-00001-of-00003.gguf`) the first one.

    Raises `UserError` for a file that is damaged, a part that is missing, what is no language model of a family that we
    know, and for metadata and tensors that contradict one another.
    """
    first = read_gguf_file(path)
    metadata = Metadata(first.values, path)
    _check_kind(metadata)
    tensors = _with_parts(first, metadata)
    config = read_config(metadata, tensors)
    check_attention(config, path)
    tokenizer = read_gguf_tokenizer(metadata)
    source = Source(
        path=path,
        layout="gguf",
        config=config | _token_ids(tokenizer.generation_config),
        tensors=_renamed(tensors, metadata, config["num_attention_heads"], config["num_key_value_heads"]),
        tokenizer=tokenizer.text,
        generation_config=tokenizer.generation_config,
        special_tokens=tokenizer.special_tokens,
        chat_templates=tokenizer.chat_templates,
    )
    check_tensors(source, read_decoder(source))
    return source


def _check_kind(metadata: Metadata) -> None:
    kind = metadata.text("general.type", "model")
    other = _OTHER_ARCHITECTURES.get(metadata.architecture) or _OTHER_KINDS.get(kind)
    if other or kind != "model":
        raise UserError(
            f"expected a language model, got {other or f'a file of the type {kind[:40]!r}'} in {metadata.path}; give "
            f"the model that it belongs to"
        )
    if metadata.architecture not in MODEL_TYPES:
        raise UserError(
            f"expected a GGUF of an architecture of {', '.join(MODEL_TYPES)}, got {metadata.architecture[:40]!r} in "
            f"{metadata.path}; export its checkpoint in safetensors"
        )


def _with_parts(first: GgufFile, metadata: Metadata) -> Mapping[str, GgufTensor]:
    """The tensors of all parts."""
    count = metadata.size("split.count", 1)
    name = _PART.match(first.path.name)
    if count == 1:
        return first.tensors
    if metadata.get("split.no") != 0 or name is None or int(name[2]) != 1 or int(name[3]) != count:
        raise UserError(
            f"expected the first of {count} parts, as NAME-00001-of-{count:05}.gguf, got {first.path}; give that one, "
            f"under its own name"
        )
    tensors = dict(first.tensors)
    for number in range(2, count + 1):
        path = first.path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf")
        if not path.is_file():
            raise UserError(f"expected {count} parts of the model, got no {path}; copy it there")
        part = read_gguf_file(path)
        if part.values.get("split.no") != number - 1 or part.values.get("split.count") != count:
            raise UserError(f"expected part {number} of {count}, got another one in {path}; copy it again")
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise UserError(f"expected each tensor once, got {min(twice)} again in {path}; copy the parts again")
        tensors |= part.tensors
    total = metadata.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise metadata.wrong("split.tensors.count", f"the number of tensors, {len(tensors)}", total)
    return tensors


def _renamed(
    tensors: Mapping[str, GgufTensor], metadata: Metadata, heads: int, kv_heads: int
) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name in ROPE_TENSORS:
            continue  # the config has them
        renamed = as_stored(tensor, metadata.architecture, heads, kv_heads)
        if renamed is None or renamed.name in stored:
            raise UserError(
                f"expected only the tensors of a {metadata.architecture} in {metadata.path}, got {name[:80]!r}, too; "
                f"choose another file"
            )
        stored[renamed.name] = renamed
    return stored


def _token_ids(generation_config: Mapping[str, object]) -> dict[str, object]:
    """As config.json has them, too."""
    return {key: value for key, value in generation_config.items() if key.endswith("_token_id")}
