"""The folder of an OpenVINO IR that somebody exported, as a source: its weights stay in its graph."""

from __future__ import annotations

from pathlib import Path

from dovetail.export.sources import settings
from dovetail.export.sources.base import Source
from dovetail.runtime.errors import UserError

IR_MODEL, IR_WEIGHTS = "openvino_model.xml", "openvino_model.bin"


def read_ir_folder(folder: Path, allow_pickle: bool = False) -> Source:
    """The source in `folder`, which has an `openvino_model.xml`. Raises `UserError` where something is missing."""
    if not (folder / IR_WEIGHTS).is_file():
        raise UserError(f"expected {IR_WEIGHTS} beside {IR_MODEL} in {folder}, got none; copy the IR again")
    config = settings.read_object(folder / "config.json", missing={})
    if not isinstance(config.get("model_type"), str) or not isinstance(config.get("max_position_embeddings"), int):
        raise UserError(
            f"expected the model's config.json (model_type, max_position_embeddings) beside the IR in {folder}, got "
            f"none; copy it from the checkpoint"
        )
    return Source(
        path=folder,
        layout="ir",
        config=config,
        tensors={},
        tokenizer=settings.read_tokenizer(folder),
        generation_config=settings.read_generation_config(folder, config),
        special_tokens=settings.read_special_tokens(folder),
        chat_templates=settings.read_chat_templates(folder),
        allow_pickle=allow_pickle,
    )
