"""A draft folder as somebody else published it: what its layout's reader starts from, what the reader makes of it, and
the checks that all of them share.

Letters: V the target's vocabulary, N tokens of the draft's LM head, D hidden size.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dovetail.export.draft.config import DraftConfig, check_fits, config_for
from dovetail.export.sources.base import Source
from dovetail.runtime.errors import UserError

Weights = dict[str, Tensor]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose blocks a draft may have
SAME_EMBEDDING = 0.5  # mean cosine with the target's rows; another vocabulary's would be near 0
_BLOCK_NAMES = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.o_proj": "o_proj",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
}


@dataclasses.dataclass(frozen=True, slots=True)
class DraftedTarget:
    """What a draft is held against: the target's weights and config, and the source that they are of."""

    source: Source
    config: Any
    embedding: Tensor  # [V, D]
    lm_head: Tensor  # [V, D]

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's."""
        return Tokenizer.from_str(self.source.tokenizer)


@dataclasses.dataclass(frozen=True, slots=True)
class DraftParts:
    """What a layout's reader makes of a folder: all that a `DraftModel` consists of. `weights` go by our names, but for
    those of the blocks, whose names are the same in all layouts (see `with_our_block_names`).
    """

    config: DraftConfig
    weights: Weights
    embedding: Tensor  # [V, D]
    lm_head: Tensor  # [V, D], or [N, D]
    head_tokens: Tensor | None = None  # [N]


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedDraft:
    """A folder, its config.json, its tensors, and the target it is read for. A reader takes `weights` out one by one:
    those left over go into the blocks.
    """

    folder: Path
    document: dict[str, Any]
    weights: Weights
    target: DraftedTarget

    @property
    def names(self) -> set[str]:
        """Of the tensors, without `.weight`."""
        return {name.removesuffix(".weight") for name in self.weights}

    def config(self, kind: str, **more: Any) -> DraftConfig:
        """The sizes in config.json; `more` are further fields of `DraftConfig`. Raises `UserError` where sizes are
        missing or are not the target's.
        """
        own, vocab_size = self.own_config(kind, **more), self._sizes().get("vocab_size", len(self.target.embedding))
        config = dataclasses.replace(own, vocab_size=vocab_size)
        for size in (config.hidden_size, self.document.get("target_hidden_size") or config.hidden_size):
            check_fits(dataclasses.replace(config, hidden_size=size), *self.target.embedding.shape)
        return config

    def own_config(self, kind: str, **more: Any) -> DraftConfig:
        """The same for a draft that need not have the target's sizes."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, LlamaConfig

        sizes = self._sizes()
        family = sizes.pop("model_type", "llama")
        try:
            like = AutoConfig.for_model(family, **sizes) if family in FAMILIES else LlamaConfig(**sizes)
            numbers = {int(name[1]) for key in self.weights if (name := re.match(r"layers\.(\d+)\.", key))}
            return config_for(
                like,
                max(numbers, default=0) + 1,
                kind,
                qkv_bias=any(name.endswith("q_proj.bias") for name in self.weights),
                qk_norm=any(name.endswith("q_norm.weight") for name in self.weights),
                **more,
            )
        except (KeyError, TypeError, AttributeError, ValueError, StrictDataclassError) as error:
            raise UserError(
                f"expected the sizes of a Llama in {self.folder}/config.json, got "
                f"{str(error).splitlines()[0]:.100}; copy the draft again"
            ) from None

    def _sizes(self) -> dict[str, Any]:
        return dict(self.document.get("transformer_layer_config", self.document))

    def drop_targets_own(self) -> None:
        """Some published drafts repeat the target's embedding or head."""
        embedding = self.weights.pop("embed_tokens.weight", None)
        if embedding is not None:
            self.check_embedding(embedding.float())
        self.weights.pop("lm_head.weight", None)

    def check_embedding(self, embedding: Tensor) -> None:
        """A published draft repeats the embedding it was trained on: the target's, or it is for another model."""
        if embedding.shape != self.target.embedding.shape:
            raise unexpected_shape("embed_tokens.weight", embedding.shape, self.target.embedding.shape, self.folder)
        likeness = float(torch.nn.functional.cosine_similarity(embedding, self.target.embedding, dim=-1).mean())
        if not likeness > SAME_EMBEDDING:
            raise UserError(
                f"expected the target's embedding in {self.folder}, got another (mean cosine {likeness:.2f}); choose a "
                f"draft made for this target and this vocabulary"
            )


def with_our_block_names(weights: Weights) -> Weights:
    """The same with the blocks' tensors by our names."""
    renamed = {}
    for key, tensor in weights.items():
        name, _, end = key.rpartition(".")
        in_block = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if in_block:
            name = f"blocks.{in_block[1]}.{_BLOCK_NAMES.get(in_block[2], in_block[2])}"
        renamed[f"{name}.{end}" if name else end] = tensor
    return renamed


def check_tokens(tokens: Tensor, vocab_size: int, folder: Path) -> None:
    """Raise `UserError` unless these are different tokens of the target's."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size or len(torch.unique(tokens)) < len(tokens):
        raise UserError(
            f"expected d2t to name different tokens from 0 to {vocab_size - 1}, got {low} to {high} in {folder}; "
            f"choose a draft made for this target"
        )


def unexpected_shape(name: str, got: Any, expected: Any, folder: Path) -> UserError:
    """The error for a tensor of another shape."""
    return UserError(
        f"expected {name} of shape {tuple(expected)}, got {tuple(got)} in {folder}; choose a draft made for this target"
    )
