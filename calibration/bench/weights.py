"""How many bytes of weights one pass of a target reads, and how many a runner holds in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dovetail.calibration.bench.gguf_file import read_gguf
from dovetail.runtime.artifact.manifest import TARGET_WEIGHTS
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.errors import UserError

TARGET_CONFIG = "target/config.json"  # of the checkpoint, kept beside the IR for OpenVINO GenAI
# Of embeddings: int4 exports keep them int8.
_BYTES_PER_WEIGHT = {"int8": 1.0, "int8_asym": 1.0, "int4": 1.0, "fp16": 2.0, "fp32": 4.0}
_MAX_HEADER_BYTES = 100 << 20


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


def checkpoint_sizes(checkpoint: Path, name: str) -> tuple[int | None, int | None]:
    """(vocabulary, hidden size) of a checkpoint folder or a GGUF file. Raises `UserError` naming the parameter that
    gave it.
    """
    if checkpoint.is_file():
        file = read_gguf(checkpoint)
        return file.vocab_size, file.hidden_size
    config = _config(checkpoint, name)
    return config.get("vocab_size"), config.get("hidden_size")


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{name}: expected a checkpoint folder with config.json or a GGUF file, got {folder}; give the model's own"
        ) from None
    except ValueError as error:
        raise UserError(f"{name}: expected JSON in {folder}/config.json, got {error}; copy it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{name}: expected an object in {folder}/config.json, got a list; copy it again")
    return config


def checkpoint_weights(checkpoint: Path) -> int:
    """How many numbers a checkpoint holds, by the headers of its files. Raises `UserError`."""
    if checkpoint.is_file():
        return read_gguf(checkpoint).num_weights
    count = 0
    for path in checkpoint.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                size = min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES)
                header = json.loads(file.read(size))
            count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"expected a file of safetensors, got {path}, which is damaged; copy it again") from None
    return count
