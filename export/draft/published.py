"""A draft as somebody else published it: what its layout's reader starts from, and the checks that all of them share.

Letters: V the target's vocabulary, N tokens of the draft's LM head, D hidden size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dovetail.export.draft.config import DraftConfig, block_sizes, check_fits, config_for
from dovetail.export.sources.base import Source
from dovetail.export.sources.tensors import Matrix
from dovetail.export.target.native.decoder import Decoder
from dovetail.runtime.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose blocks a draft may have
SAME_EMBEDDING = 0.5  # mean cosine with the target's rows; another vocabulary's would be near 0
_CONTEXT = 2048  # of a draft whose config says none: of no consequence but for the rotary kinds that ask for it
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
    """What a draft is held against: the target's source and two of its weights."""

    source: Source
    embedding: Matrix  # [V, D]
    lm_head: Matrix  # [V, D]

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's."""
        return Tokenizer.from_str(self.source.tokenizer)

    @property
    def num_layers(self) -> int:
        """How many there are. Raises `UserError` where the config does not say."""
        return self._size("num_hidden_layers")

    @property
    def context_length(self) -> int:
        """In tokens. Raises `UserError` where the config does not say."""
        return self._size("max_position_embeddings")

    def _size(self, name: str) -> int:
        size = self.source.config.get(name)
        if type(size) is not int or size < 1:
            raise UserError(
                f"expected {name} as a positive whole number in the config of {self.source.path}, got {size!r}; copy "
                f"the checkpoint again"
            )
        return size


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedDraft:
    """A draft's source, its tensors (see `read_arrays`), and the target it is read for. A reader
    takes `tensors` out one by one: those left over go into the blocks.
    """

    source: Source
    tensors: dict[str, NDArray[Any]]
    target: DraftedTarget

    @property
    def path(self) -> Path:
        """The folder or the file, for messages."""
        return self.source.path

    @property
    def document(self) -> Mapping[str, Any]:
        """Its config.json."""
        return self.source.config

    @property
    def names(self) -> set[str]:
        """Of the tensors, without `.weight`."""
        return {name.removesuffix(".weight") for name in self.tensors}

    def config(self, kind: str, **more: Any) -> DraftConfig:
        """The sizes in config.json; `more` are further fields of `DraftConfig`. Raises `UserError` where sizes are
        missing or are not the target's.
        """
        config = self.own_config(kind, **more)
        for size in (config.hidden_size, self.document.get("target_hidden_size") or config.hidden_size):
            check_fits(dataclasses.replace(config, hidden_size=size), *self.target.embedding.shape)
        return config

    def own_config(self, kind: str, **more: Any) -> DraftConfig:
        """The same for a draft that need not have the target's sizes."""
        return config_for(
            self.decoder(),
            self.num_blocks,
            kind,
            qkv_bias=any(name.endswith("q_proj.bias") for name in self.tensors),
            qk_norm=any(name.endswith("q_norm.weight") for name in self.tensors),
            **more,
        )

    def decoder(self) -> Decoder:
        """What config.json says of the blocks; of all tensors it may leave out what the tensors tell. Raises
        `UserError` where sizes are missing, or the blocks compute something else than ours.
        """
        sizes = self.document.get("transformer_layer_config")
        sizes = sizes if isinstance(sizes, dict) else self.document
        told = {
            "vocab_size": len(self.target.embedding),
            "num_hidden_layers": self.num_blocks,
            "max_position_embeddings": _CONTEXT,
        }
        known = told | {name: value for name, value in sizes.items() if value is not None}
        decoder = block_sizes(dataclasses.replace(self.source, config=known))
        rotated = {2 * len(layer.rotary.frequencies) for layer in decoder.layers if layer.rotary is not None}
        if decoder.activation != "silu" or rotated != {decoder.head_dim}:
            foreign = decoder.activation if decoder.activation != "silu" else f"rotated parts of {decoder.head_dim}"
            raise UserError(
                f"expected a draft with SiLU and heads that are rotated as a whole, got {foreign} in {self.path}; "
                f"choose another one"
            )
        return decoder

    @property
    def num_blocks(self) -> int:
        """How many there are among the tensors."""
        numbers = {int(name[1]) for key in self.tensors if (name := re.match(r"layers\.(\d+)\.", key))}
        return max(1, len(numbers))

    def drop_targets_own(self) -> None:
        """Some published drafts repeat the target's embedding or head."""
        embedding = self.tensors.pop("embed_tokens.weight", None)
        if embedding is not None:
            self.check_embedding(embedding)
        self.tensors.pop("lm_head.weight", None)

    def check_embedding(self, embedding: Matrix) -> None:
        """A published draft repeats the embedding it was trained on: the target's, or it is for another model."""
        ours = self.target.embedding
        if embedding.shape != ours.shape:
            raise unexpected_shape("embed_tokens.weight", embedding.shape, ours.shape, self.path)
        products, *squares = (
            np.einsum("vd,vd->v", a, b) for a, b in ((embedding, ours), (embedding,) * 2, (ours,) * 2)
        )
        likeness = float((products / np.sqrt(np.maximum(squares[0] * squares[1], 1e-16))).mean())
        if not likeness > SAME_EMBEDDING:
            raise UserError(
                f"expected the target's embedding in {self.path}, got another (mean cosine {likeness:.2f}); choose a "
                f"draft made for this target and this vocabulary"
            )


def with_our_names(tensors: Mapping[str, NDArray[Any]], names: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The same by our names: those of `names`, in which a module's name stands without `.weight` or `.bias`, and of the
    blocks, whose names are the same in all layouts.
    """
    renamed = {}
    for key, tensor in tensors.items():
        name, _, end = key.rpartition(".")
        in_block = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if name in names:
            name = names[name]
        elif in_block:
            name = f"blocks.{in_block[1]}.{_BLOCK_NAMES.get(in_block[2], in_block[2])}"
        renamed[f"{name}.{end}" if name else end] = tensor
    return renamed


def check_tokens(tokens: NDArray[np.int64], vocab_size: int, path: Path) -> None:
    """Raise `UserError` unless these are different tokens of the target's."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size or len(np.unique(tokens)) < len(tokens):
        raise UserError(
            f"expected an LM head of different tokens from 0 to {vocab_size - 1}, got {low} to {high} in {path}; "
            f"choose a draft made for this target"
        )


def unexpected_shape(name: str, got: Any, expected: Any, path: Path) -> UserError:
    """The error for a tensor of another shape."""
    return UserError(
        f"expected {name} of shape {tuple(expected)}, got {tuple(got)} in {path}; choose a draft made for this target"
    )
