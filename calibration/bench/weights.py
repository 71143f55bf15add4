"""How many bytes of weights one pass of a target reads, and how many a runner holds in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dovetail.runtime.artifact.manifest import TARGET_WEIGHTS
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.errors import UserError

TARGET_CONFIG = "target/config.json"  # of the checkpoint, kept beside the IR for OpenVINO GenAI
# Of embeddings: int4 exports keep them int8.
_BYTES_PER_WEIGHT = {"int8": 1.0, "int8_asym": 1.0, "int4": 1.0, "fp16": 2.0, "fp32": 4.0}
_MAX_HEADER_BYTES = 100 << 20
Q8_0_BYTES = 34 / 32  # per weight: blocks of 32 share a float16 scale


def target_bytes_per_pass(artifact: Artifact) -> int | None:
    """Bytes of the target's weights without an embedding table that is only looked up; None where the artifact does
    not tell whether the table is the LM head, too.
    """
    if not artifact.has(TARGET_CONFIG):
        return None
    try:
        config = json.loads(artifact.file(TARGET_CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        return None
    target = artifact.manifest.target
    table = target.vocab_size * target.hidden_size * _BYTES_PER_WEIGHT[target.weight_format]
    whole = artifact.manifest.files[TARGET_WEIGHTS].bytes
    return whole if config.get("tie_word_embeddings") else round(whole - table)


def checkpoint_config(folder: Path, name: str) -> dict[str, Any]:
    """`config.json` of a checkpoint folder. Raises `UserError` naming the parameter that gave it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{name}: expected a checkpoint folder with config.json, got {folder}; give the folder of the model"
        ) from None
    except ValueError as error:
        raise UserError(f"{name}: expected JSON in {folder}/config.json, got {error}; copy it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{name}: expected an object in {folder}/config.json, got a list; copy it again")
    return config


def checkpoint_weights(folder: Path) -> int:
    """How many numbers a checkpoint's safetensors hold, by the headers of its files. Raises `UserError`."""
    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                size = min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES)
                header = json.loads(file.read(size))
            count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"expected a file of safetensors, got {path}, which is damaged; copy it again") from None
    return count
