"""The sizes and kind of a draft, as it is stored beside its weights, and which of them a target asks for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from dovetail.export.sources.base import Source
from dovetail.export.sources.settings import read_object
from dovetail.export.target.native.decoder import Decoder
from dovetail.export.target.native.families import FAMILIES, read_decoder
from dovetail.runtime.artifact import strict_json
from dovetail.runtime.artifact.manifest import DRAFT_KINDS
from dovetail.runtime.artifact.strict_json import shown
from dovetail.runtime.errors import UserError

_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


@dataclasses.dataclass(frozen=True, slots=True)
class DraftConfig:
    """Stored as `config.json` beside `model.safetensors`. `rope_frequencies` are radians per position, E / 2 of them.

    The fields with defaults are for some drafts only. `head_size`: tokens that its LM head has, its own or rows of the
    target's; None: all. `feature_layers`: whose inputs in the target are projected to a feature; () is the last hidden
    state, after the final norm. `vocabulary_sha256`: of the tokenizer it was trained with.
    """

    kind: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_frequencies: tuple[float, ...]
    rope_scale: float = 1.0
    head_size: int | None = None
    feature_layers: tuple[int, ...] = ()
    fusion_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_before_residual: bool = False
    vocabulary_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in DRAFT_KINDS:
            raise UserError(
                f"expected a draft of kind {', '.join(DRAFT_KINDS)}, got {shown(self.kind)}; train one with "
                f"dovetail-export draft"
            )
        sizes = [getattr(self, name) for name in _SIZES]
        numbers = (self.rms_norm_eps, self.rope_scale, *self.rope_frequencies)
        if not all(type(size) is int and size > 0 for size in sizes) or not all(map(_is_number, numbers)):
            raise UserError(
                f"expected a draft config with positive whole numbers for {', '.join(_SIZES)}, and finite frequencies, "
                f"got {shown(sizes)}; train the draft again"
            )
        if self.num_heads % self.num_kv_heads or len(self.rope_frequencies) * 2 != self.head_dim:
            raise UserError(
                "expected a draft config with whole heads per key/value head and head_dim / 2 frequencies; train the "
                "draft again"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def config_for(like: Decoder, num_blocks: int, kind: str = "dgf", **more: Any) -> DraftConfig:
    """A draft whose blocks are `like` a decoder's: the same widths, heads and rotary frequencies.

    `more` are further fields of `DraftConfig`; those that a kind wants of itself are in `DraftKind.config_for`.
    """
    if num_blocks < 1:
        raise UserError(f"expected at least one block, got `blocks` {num_blocks}; the paper uses 1 to 5")
    frequencies, scale = _rotary(like)
    return DraftConfig(
        kind=kind,
        hidden_size=like.hidden_size,
        intermediate_size=like.intermediate_size,
        num_layers=num_blocks,
        num_heads=like.num_heads,
        num_kv_heads=like.num_kv_heads,
        head_dim=like.head_dim,
        vocab_size=like.vocab_size,
        rms_norm_eps=like.rms_norm_eps,
        rope_frequencies=frequencies,
        rope_scale=scale,
        **more,
    )


def block_sizes(source: Source) -> Decoder:
    """What the config of `source`, a target or a draft, says of its blocks. A family whose graph we do not build (a
    mixture of experts) is read as a Llama is: a draft takes widths, heads and rotary frequencies of it and no more.

    Raises `UserError` where sizes are missing.
    """
    if source.config.get("model_type") not in FAMILIES:
        source = dataclasses.replace(source, config={**source.config, "model_type": "llama"})
    return read_decoder(source)


def _rotary(like: Decoder) -> tuple[tuple[float, ...], float]:
    """Radians a position per pair of a head's entries, and the factor on cosine and sine: of the layers that see the
    whole context, as a draft does, where others have a rotary of their own (Gemma 3).
    """
    layers = sorted((layer for layer in like.layers if layer.rotary is not None), key=lambda x: x.window is not None)
    rotary = layers[0].rotary if layers else None
    frequencies = () if rotary is None else rotary.frequencies
    still = (0.0,) * (like.head_dim // 2 - len(frequencies))  # of heads that are rotated in part (Phi-3 small, GLM)
    return frequencies + still, 1.0 if rotary is None else rotary.scale


def read_config(folder: Path) -> DraftConfig:
    """The config of a draft folder that `save_draft` wrote. Raises `UserError` if it is not one."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(
                f"expected a draft folder with {name}, got {folder} without it; train one with dovetail-export draft"
            )
    path = folder / "config.json"

    def refuse(expected: str, got: object) -> NoReturn:
        raise UserError(f"expected {expected} in {path}, got {shown(got)}; train one with dovetail-export draft")

    return strict_json.decode(DraftConfig, read_object(path), "a draft", refuse)


def check_fits(config: DraftConfig, vocab_size: int, hidden_size: int) -> None:
    """Raise `UserError` unless the draft was made for a target of these sizes."""
    pairs = (("vocabulary", config.vocab_size, vocab_size), ("hidden size", config.hidden_size, hidden_size))
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(f"draft {what} {ours} != target {what} {theirs}; train the draft for this target")


def vocabulary_sha256(tokenizer: Tokenizer) -> str:
    """One digest for all tokenizers that give every token the same id, added ones included."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
