"""The sizes of a Llama: named ones, and those of any checkpoint's config.json. How many parameters a model has that is
made of them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dovetail.export.sources.settings import read_object
from dovetail.runtime.artifact.strict_json import shown
from dovetail.runtime.errors import UserError

_STEP = 32  # of feed-forward sizes: a block of weights that share a scale
INFLATION_NOTE = "inflation.json"  # beside an inflated checkpoint: what it was made of, its source's shape among it


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What the cost of a pass depends on. The LM head is counted as a matrix of its own, not the embedding again."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise UserError(
                    f"expected a shape of positive whole numbers, got {name} {shown(size)}; correct config.json"
                )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"expected heads that the key/value heads divide, got {self.num_heads} heads and {self.num_kv_heads} "
                f"key/value heads; choose another shape"
            )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"expected a hidden size that the heads divide, as transformers does, got {self.hidden_size} and "
                f"{self.num_heads} heads; choose another shape"
            )
        if self.head_dim % 2:
            raise UserError(f"expected an even head_dim, for rotary pairs, got {self.head_dim}; choose another shape")

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    def layer_parameters(self) -> int:
        """Of one decoder layer: four attention matrices, three of the feed-forward part, two norms."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.hidden_size
        return attention + 3 * self.intermediate_size * self.hidden_size + 2 * self.hidden_size

    def parameters(self) -> int:
        """Of the whole model."""
        return 2 * self.vocab_size * self.hidden_size + self.num_layers * self.layer_parameters() + self.hidden_size

    def pass_weights(self) -> int:
        """What one pass reads: everything but the embedding, of which it looks up a few rows."""
        return self.parameters() - self.vocab_size * self.hidden_size

    def draft_parameters(self, blocks: int) -> int:
        """Of the trained part of a DGF draft for such a target. Its first block has no input norm, its fusion has one
        norm.
        """
        return 4 * self.hidden_size**2 + blocks * self.layer_parameters()


# llama-68m, 160m: the usual assistants in the literature. 1b: TinyLlama. 3b: Llama 3.2 3B with 32,000 tokens.
# 7b: Llama 1 and 2. 100m and 350m: steps between, of the same proportions. smollm2: the biggest of its family, whose
# embedding is its LM head, too.
SHAPES = {
    "llama-68m": Shape(768, 2, 3072, 12, 12, 64, 32000),
    "llama-100m": Shape(768, 8, 2048, 12, 4, 64, 32000),
    "llama-160m": Shape(768, 12, 3072, 12, 12, 64, 32000),
    "llama-350m": Shape(1024, 24, 2816, 16, 8, 64, 32000),
    "llama-1b": Shape(2048, 22, 5632, 32, 4, 64, 32000),
    "smollm2-1.7b": Shape(2048, 24, 8192, 32, 32, 64, 49152),
    "llama-3b": Shape(3072, 28, 8192, 24, 8, 128, 32000),
    "llama-7b": Shape(4096, 32, 11008, 32, 32, 128, 32000),
}


def find_shape(like: str) -> Shape:
    """A named shape, or that of a folder with a Llama's config.json. Raises `UserError` if it is neither."""
    if like in SHAPES:
        return SHAPES[like]
    if not (Path(like) / "config.json").is_file():
        raise UserError(
            f"expected a shape of {', '.join(SHAPES)} or a folder with config.json, got {like!r}; choose one of them"
        )
    return read_shape(Path(like))


def holding(shape: Shape, source: Shape) -> Shape:
    """`shape`, but with the layers and the vocabulary of a `source` that has more of them, and so much narrower
    feed-forward parts that a pass still reads as many weights: at most 1 % less.

    A 1.1 B Llama of 22 layers that is to hold SmolLM2's 30 and its 49,152 tokens:

    >>> smollm2 = Shape(576, 30, 1536, 9, 3, 64, 49152)
    >>> held = holding(SHAPES["llama-1b"], smollm2)
    >>> held.num_layers, held.intermediate_size, held.vocab_size
    (30, 3520, 49152)
    >>> round(held.pass_weights() / SHAPES["llama-1b"].pass_weights(), 3)
    0.998
    """
    num_layers, vocab_size = max(shape.num_layers, source.num_layers), max(shape.vocab_size, source.vocab_size)
    if (num_layers, vocab_size) == (shape.num_layers, shape.vocab_size):
        return shape
    thin = dataclasses.replace(shape, num_layers=num_layers, vocab_size=vocab_size, intermediate_size=_STEP)
    spare = (shape.pass_weights() - thin.pass_weights()) // (3 * num_layers * shape.hidden_size)
    if spare < 0:
        raise UserError(
            f"expected a shape of at least {thin.pass_weights() / 1e6:.0f} M weights a pass, which {num_layers} layers "
            f"and {vocab_size} tokens of that width have, got {shape.pass_weights() / 1e6:.0f} M; choose a bigger shape"
        )
    return dataclasses.replace(thin, intermediate_size=_STEP + spare // _STEP * _STEP)


def read_shape(folder: Path) -> Shape:
    """The sizes in a Llama checkpoint's config.json. Raises `UserError` if it is of another family, or has biases."""
    path = folder / "config.json"
    config = read_object(path)
    kind = config.get("model_type")
    plain = not config.get("attention_bias") and not config.get("mlp_bias") and config.get("hidden_act", "silu")
    if kind != "llama" or plain != "silu":
        foreign = f"model_type {shown(kind)}" if kind != "llama" else "biases or another activation"
        raise UserError(f"expected a Llama without biases and with SiLU, got {foreign} in {path}; choose another one")
    try:
        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
        return Shape(
            hidden_size=hidden_size,
            num_layers=config["num_hidden_layers"],
            intermediate_size=config["intermediate_size"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or hidden_size // num_heads,
            vocab_size=config["vocab_size"],
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"expected the sizes of a Llama in {path}, got no usable {error}; copy it again") from None


def check_grows(source: Shape, shape: Shape) -> None:
    """Raise `UserError` unless `source` fits into `shape`, function and all."""
    for field in dataclasses.fields(Shape):
        ours, theirs = getattr(source, field.name), getattr(shape, field.name)
        if theirs < ours:
            raise UserError(
                f"expected {field.name} of at least the source's {ours}, got {theirs}; choose a bigger shape"
            )
    if shape.head_dim % source.head_dim:
        raise UserError(
            f"expected a head_dim that the source's {source.head_dim} divides, so that rotary frequencies coincide, "
            f"got {shape.head_dim}; choose another shape"
        )
    copies = -(-source.group // shape.group)
    if source.num_kv_heads * copies > shape.num_kv_heads:
        raise UserError(
            f"expected at least {source.num_kv_heads * copies} key/value heads of {shape.group} heads each for the "
            f"source's {source.num_kv_heads} of {source.group}, got {shape.num_kv_heads}; choose another shape"
        )
