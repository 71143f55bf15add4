"""What a decoder computes, as a record: one graph (`graph.py`) is built from it for all families.

    x = embedding[ids] * embedding_scale
    each layer:  x = x + residual_scale * post_norm(attention(pre_norm(x)))
                 x = x + residual_scale * post_norm(down(activation(gate(y)) * up(y)))    y = pre_norm(x)
    logits = cap(head(norm(x)) / logits_divisor)

Which of these norms there are, and everything else in which families differ, is a field.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from dovetail.export.target.native.rotary import Rotary

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """`window`: how many tokens it attends to, itself included; None: all. `rotary`: None for a layer without positions
    (SmolLM3's every fourth).
    """

    window: int | None
    rotary: Rotary | None


@dataclasses.dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes and kinds. `family` is transformers' model_type. `head_norms`: queries and keys are normed, a head at a
    time (Qwen3, Gemma 3) or all at once (OLMo2). `norm_offset` is added to the weights of norms (Gemma: 1).
    `joined_weights`: q, k, v lie in one tensor already, gate and up in another (Phi-3). `tied`: the LM head is the
    embedding.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    layers: tuple[Layer, ...]
    activation: Activation = "silu"
    tied: bool = False
    attention_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_cap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: Literal["none", "each", "all"] = "none"
    pre_norms: bool = True
    post_norms: bool = False
    norm_offset: float = 0.0
    joined_weights: bool = False

    @property
    def rope_border(self) -> int | None:
        """How long a text may be before its rotary frequencies are others; None: they never are."""
        return min((layer.rotary.border for layer in self.layers if layer.rotary and layer.rotary.border), default=None)

    def beyond_border(self) -> Decoder:
        """The decoder that reads a text beyond `rope_border`, whatever its length."""
        layers = []
        for layer in self.layers:
            rotary = layer.rotary
            if rotary is not None and rotary.long_frequencies is not None:
                rotary = Rotary(rotary.long_frequencies, rotary.scale)
            layers.append(Layer(layer.window, rotary))
        return dataclasses.replace(self, layers=tuple(layers))

    @property
    def num_layers(self) -> int:
        """How many there are."""
        return len(self.layers)
