"""The small files beside a model's weights: what ends a text, how it is sampled by default, its chat templates and
special tokens. Parsed with care: they come from strangers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.runtime.artifact.strict_json import check_depth, shown
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text import tokenizer_check

_MAX_DIGITS = 300  # what a float holds; transformers writes 10^30 for no limit
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def parsed(text: str) -> Any:
    """The document of a JSON text, with NaN and doubled keys as published files have them. Raises `ValueError`, for one
    that is nested too deep as well, and for whole numbers that no float holds.
    """
    try:
        document = json.loads(text, parse_int=_whole_number)
        check_depth(document)
        return document
    except RecursionError:
        raise ValueError("nesting too deep") from None


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def read_object(path: Path, missing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file; `missing` where there is no such file. Raises `UserError` if it is something else."""
    if missing is not None and not path.is_file():
        return dict(missing)
    try:
        document = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"expected {path} to be a JSON object, got {error}; copy it again") from None
    if not isinstance(document, dict):
        raise UserError(f"expected {path} to be a JSON object, got {type(document).__name__}; copy it again")
    return document


def read_tokenizer(folder: Path) -> str:
    """The text of tokenizer.json in `folder`. Raises `UserError` where there is none that the runtime reads."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"expected tokenizer.json in {folder}, got none; save the fast tokenizer there "
            f"(AutoTokenizer.save_pretrained)"
        )
    try:
        text = path.read_text(encoding="utf-8")
        document = parsed(text)
    except (OSError, ValueError) as error:
        raise UserError(f"expected {path} to be JSON, got {error}; save the tokenizer again") from None
    try:
        tokenizer_check.check(document)
    except ArtifactError as error:
        raise UserError(str(error)) from None
    return text


def read_generation_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json, with the ids that begin and end a text wherever the checkpoint keeps them."""
    settings = read_object(folder / "generation_config.json", missing={})
    for key in ("bos_token_id", "eos_token_id"):
        if settings.get(key) is None and config.get(key) is not None:
            settings[key] = config[key]
    return settings


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Name -> text, from where save_pretrained keeps them; a token may be its text or an object with it."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_object(folder / name, missing={})
        for key in SPECIAL_TOKENS:
            token = settings.get(key)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                tokens[key] = text
    return tokens


def read_chat_templates(folder: Path) -> dict[str, str]:
    """Name -> template: `default`, and whatever others the checkpoint has, from the files of today and from where older
    checkpoints keep them (tokenizer_config.json, as a text or a list of named ones). Files win.
    """
    inline = read_object(folder / "tokenizer_config.json", missing={}).get("chat_template")
    templates: dict[str, str] = {"default": inline} if isinstance(inline, str) else {}
    for entry in inline if isinstance(inline, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str):
            templates[entry["name"]] = entry["template"]
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"expected a chat template in {path}, got {error}; copy it again") from None
    return templates


def check_attention(config: Mapping[str, Any], path: Path) -> None:
    """Raise `UserError` for attention that OpenVINO's paged attention does not compute."""
    if config.get("attn_logit_softcapping"):
        raise UserError(
            f"expected attention without a cap on its logits, got attn_logit_softcapping "
            f"{shown(config['attn_logit_softcapping'])} in {path}, which OpenVINO's paged attention does not carry; "
            f"choose another model"
        )
