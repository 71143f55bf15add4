"""What SRC names: a checkpoint folder, the folder of an OpenVINO IR, or a model on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from dovetail.export.sources.checkpoint import check_checkpoint, check_tokenizer
from dovetail.export.sources.hub import download
from dovetail.runtime.errors import UserError

IR_MODEL, IR_WEIGHTS = "openvino_model.xml", "openvino_model.bin"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A folder that was checked: an IR's (`is_ir`), or a checkpoint's. Weights, a draft's too, may be pickles if those
    were asked for.
    """

    folder: Path
    is_ir: bool
    allow_pickle: bool = False


def find_source(name: str | Path, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """The source `name`: a folder, or else an id `organisation/model` that is fetched from the hub at `revision` (a
    branch, tag or commit).

    Raises `UserError` when there is no such thing, or when it can't be exported.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"expected `revision` with a hub id, got the folder {folder}; drop one of them")
    elif isinstance(name, str) and _HUB_ID.match(name) and not folder.is_file():
        folder = download(name, revision, allow_pickle)
    else:
        raise UserError(
            f"expected a checkpoint folder, an IR folder or a hub id (organisation/model), got {name}, which is none; "
            f"check the path"
        )
    if (folder / IR_MODEL).is_file():
        _check_ir(folder)
        return Source(folder, is_ir=True, allow_pickle=allow_pickle)
    check_checkpoint(folder, allow_pickle)
    return Source(folder, is_ir=False, allow_pickle=allow_pickle)


def _check_ir(folder: Path) -> None:
    if not (folder / IR_WEIGHTS).is_file():
        raise UserError(f"expected {IR_WEIGHTS} beside {IR_MODEL} in {folder}, got none; copy the IR again")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = config["model_type"], config["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError):
        sizes = None, None
    if not isinstance(sizes[0], str) or not isinstance(sizes[1], int):
        raise UserError(
            f"expected the model's config.json (model_type, max_position_embeddings) beside the IR in {folder}, got "
            f"none; copy it from the checkpoint"
        )
    check_tokenizer(folder)
