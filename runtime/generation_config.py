"""The artifact's `generation_config.json`: which tokens end an answer, and how its makers like it to be sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dovetail.runtime import strict_json
from dovetail.runtime.artifact import Artifact
from dovetail.runtime.errors import ArtifactError
from dovetail.runtime.manifest import GENERATION_CONFIG

_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """`do_sample` false is greedy whatever the rest says. `top_k` 0 and `top_p` 1 are off."""

    eos_token_ids: frozenset[int] = frozenset()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def load_generation_config(artifact: Artifact) -> GenerationConfig:
    """Read the file if the artifact has one; fields unknown here are ignored. Raises `ArtifactError`."""
    if not artifact.has(GENERATION_CONFIG):
        return GenerationConfig()
    document = strict_json.parse(artifact.file(GENERATION_CONFIG).read_bytes(), GENERATION_CONFIG, _MAX_BYTES)
    _require(isinstance(document, dict), "document", "an object", document)
    vocab_size = artifact.manifest.target.vocab_size
    eos = document.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for token_id in ids:
        good = type(token_id) is int and 0 <= token_id < vocab_size
        _require(good, "eos_token_id", f"token ids below {vocab_size}", token_id)
    sample = document.get("do_sample")
    _require(sample is None or type(sample) is bool, "do_sample", "true or false", sample)
    top_k = document.get("top_k")
    _require(top_k is None or (type(top_k) is int and 0 <= top_k <= 1 << 24), "top_k", "an integer of 0 or more", top_k)
    return GenerationConfig(
        eos_token_ids=frozenset(ids),
        do_sample=bool(sample),
        temperature=_number(document, "temperature", 100.0),
        top_k=top_k or 0,
        top_p=_number(document, "top_p", 1.0),
    )


def _number(document: dict[str, Any], name: str, high: float) -> float:
    """A number above 0 and at most `high`; 1 where the file has none."""
    value = document.get(name)
    if value is None:
        return 1.0
    _require(type(value) in (int, float) and 0 < value <= high, name, f"a number above 0 and up to {high:g}", value)
    return float(value)


def _require(condition: bool, where: str, expected: str, got: object) -> None:
    if not condition:
        shown = strict_json.shown(got)
        raise ArtifactError(f"{GENERATION_CONFIG} {where}: expected {expected}, got {shown}; export the artifact again")
