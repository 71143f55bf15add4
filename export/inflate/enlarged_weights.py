"""Growing a Llama's matrices into a bigger shape that computes the same function, so that a small trained model can be
timed at a big one's cost.

- Hidden size: padded channels stay zero. RMSNorm divides by a mean over D channels instead of d, so its weight is
  multiplied by sqrt(d / D), and its epsilon by d / D.
- Values and feed-forward units: half of the added ones are zero (their rows in v_proj and up_proj are) and read by
  random columns of o_proj and down_proj; half are random and read by zero columns. A layer that is added has nothing
  else. So no matrix is all zero or equal to another: OpenVINO keeps equal ones once, and the cost would not be the
  shape's.
- Head size E -> F: rotary pair i turns by theta^(-2i / E), so it goes to pair i F / E; queries are multiplied by
  sqrt(F / E), because attention divides by the root of the head size; the keys of pairs between are zero.
- Key/value heads: one whose group of queries does not fit the new, smaller group is doubled.
- Vocabulary: `Constant` below.

Everything else is random with the standard deviation of the trained matrix, and beside trained entries below the
largest of their row: so the row's 8-bit scale and weights are the small model's (with another head size, which rounds
the queries' scales to float16 anew, nearly).

Letters: d, D hidden size before and after; F feed-forward units; E head size; T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.export.sources.llama_shapes import Shape, check_grows
from dovetail.runtime.errors import UserError

Weights = dict[str, Tensor]

_BELOW = 0.99  # of a row's largest trained entry, whose sign decides its 8-bit scale as well, stay added ones

# The units that keep the padded tokens away (see `Enlargement.add_constant`), and the fewest that do it reliably.
CONSTANT_UNITS, MIN_CONSTANT_UNITS = 256, 128
PADDED_ROW = -32.0  # what the LM head's padded rows hold on the constant channel ...
CONSTANT_LEVEL = 4.0  # ... and the least that the channel holds behind the final norm: their logits are about -128


class Enlargement:
    """From one shape into another, with the random numbers that fill the rest: deterministic in seed and calls."""

    def __init__(self, source: Shape, shape: Shape, seed: int) -> None:
        """Raises `UserError` unless `source` fits into `shape`."""
        check_grows(source, shape)
        if shape.vocab_size > source.vocab_size:
            _check_room_for_constant(source, shape)
        self.source, self.shape = source, shape
        self._random = torch.Generator().manual_seed(seed)
        self._norm_scale = math.sqrt(source.hidden_size / shape.hidden_size)
        copies = -(-source.group // shape.group)
        heads = torch.arange(source.num_heads)
        within = heads % source.group
        kv_heads = heads // source.group * copies + within // shape.group  # the new one that each old head reads
        self._query_rows = self._head_rows(kv_heads * shape.group + within % shape.group)
        self._kv_heads = torch.arange(source.num_kv_heads * copies)  # the new ones that hold an old one
        self._kv_rows = self._head_rows(self._kv_heads)
        self._kv_sources = torch.arange(source.num_kv_heads * source.head_dim).view(-1, source.head_dim)
        self._kv_sources = self._kv_sources.repeat_interleave(copies, 0).flatten()

    @property
    def pads_vocabulary(self) -> bool:
        """Whether there are padded tokens to be kept away."""
        return self.shape.vocab_size > self.source.vocab_size

    def _pair_dims(self) -> Tensor:
        """Where the old entries of a head lie in a new one. Rotary pair i is entries i and i + E / 2.  # [E]"""
        pairs = torch.arange(self.source.head_dim // 2) * (self.shape.head_dim // self.source.head_dim)
        return torch.cat([pairs, pairs + self.shape.head_dim // 2])

    def _head_rows(self, heads: Tensor) -> Tensor:
        return (heads[:, None] * self.shape.head_dim + self._pair_dims()).flatten()

    def inputs(
        self, weight: Tensor, size: tuple[int, int], rows: Tensor | None, columns: Tensor | None = None
    ) -> Tensor:
        """A matrix that reads: old entries at `rows` (None: nowhere) x `columns` (default: the first ones), random
        elsewhere.
        """
        grown = torch.randn(*size, generator=self._random) * weight.std()
        if rows is not None:
            largest = _BELOW * weight.abs().amax(1, keepdim=True)
            trained_rows = grown[rows].clamp(-largest, largest)
            trained_rows[:, torch.arange(weight.shape[1]) if columns is None else columns] = weight
            grown[rows] = trained_rows
        return grown

    def outputs(self, weight: Tensor, silent: Tensor, columns: Tensor | None) -> Tensor:
        """A matrix that writes [D, inputs]: old entries in `columns` (None: nowhere), random where its inputs are
        `silent` [inputs], zero elsewhere.
        """
        grown = torch.randn(self.shape.hidden_size, len(silent), generator=self._random) * weight.std()
        largest = _BELOW * weight.abs().amax(1, keepdim=True)
        grown[: len(weight)] = grown[: len(weight)].clamp(-largest, largest)
        grown[:, ~silent] = 0
        if columns is not None:
            grown[: len(weight), columns] = weight
        return grown

    def norm(self, weight: Tensor) -> Tensor:
        """[d] -> [D]; what is added multiplies zeros."""
        grown = weight.mean() * (torch.rand(self.shape.hidden_size, generator=self._random) * 0.2 + 0.9)
        grown[: len(weight)] = weight
        return grown * self._norm_scale

    def embedding(self, weight: Tensor) -> Tensor:
        """[V, d] -> [V', D]. Padded tokens are never fed."""
        grown = self.inputs(weight, (self.shape.vocab_size, self.shape.hidden_size), torch.arange(len(weight)))
        grown[: len(weight), weight.shape[1] :] = 0
        return grown

    def lm_head(self, weight: Tensor) -> Tensor:
        """[V, d] -> [V', D]. The last channel is the constant's, where padded tokens need one."""
        grown = self.inputs(weight, (self.shape.vocab_size, self.shape.hidden_size), torch.arange(len(weight)))
        if self.pads_vocabulary:
            grown[: len(weight), -1] = 0
            grown[len(weight) :, -1] = PADDED_ROW
        return grown

    def layer(self, old: Weights, trained: bool = True) -> Weights:
        """A decoder layer by the draft's names; one that is added (`trained` False) takes from `old` only its scale."""
        shape, width, units = self.shape, self.shape.hidden_size, self.shape.intermediate_size
        keys, root = shape.num_kv_heads * shape.head_dim, math.sqrt(shape.head_dim / self.source.head_dim)
        query_rows, kv_rows = (self._query_rows, self._kv_rows) if trained else (None, None)
        unit_rows = torch.arange(self.source.intermediate_size) if trained else None
        values, silent_units = self._silent(trained)
        grown = {
            "q_proj": self.inputs(old["q_proj"] * root, (shape.num_heads * shape.head_dim, width), query_rows),
            "k_proj": self.inputs(old["k_proj"][self._kv_sources], (keys, width), kv_rows),
            "v_proj": self.inputs(old["v_proj"][self._kv_sources], (keys, width), kv_rows),
            "o_proj": self.outputs(old["o_proj"], values.repeat_interleave(shape.group, 0).flatten(), query_rows),
            "gate_proj": self.inputs(old["gate_proj"], (units, width), unit_rows),
            "up_proj": self.inputs(old["up_proj"], (units, width), unit_rows),
            "down_proj": self.outputs(old["down_proj"], silent_units, unit_rows),
        }
        grown["v_proj"][values.flatten()] = 0
        grown["up_proj"][silent_units] = 0
        if trained:
            by_head = grown["k_proj"].view(shape.num_kv_heads, shape.head_dim, width)
            by_head[self._kv_heads[:, None], self._between().nonzero().T] = 0
        return grown | {name: self.norm(old[name]) for name in ("input_norm", "mlp_norm") if name in old}

    def _silent(self, trained: bool) -> tuple[Tensor, Tensor]:
        """Which values [KV heads, head size] and units [F] are made to be zero: half of what is added."""
        values = torch.zeros(self.shape.num_kv_heads, self.shape.head_dim, dtype=torch.bool)
        values[:, : self.shape.head_dim // 2] = True
        units = torch.zeros(self.shape.intermediate_size, dtype=torch.bool)
        first = self.source.intermediate_size if trained else 0
        units[first : first + (len(units) - first) // 2] = True
        if trained:
            values[self._kv_heads] = self._between()
        return values, units

    def _between(self) -> Tensor:
        """Entries of a new head that are of no old rotary pair.  # [head size] bool"""
        between = torch.ones(self.shape.head_dim, dtype=torch.bool)
        between[self._pair_dims()] = False
        return between

    def fusion(self, old: Weights) -> Weights:
        """The draft's DGF by its names: its padded channels are zero, whatever the gate's random rows say."""
        d, width = self.source.hidden_size, self.shape.hidden_size
        old_channels = torch.arange(d)
        grown = {name: self.inputs(old[name], (width, width), old_channels) for name in ("w1", "w2")}
        for weight in grown.values():
            weight[d:] = 0
        if self.pads_vocabulary:
            grown["w1"][:, -1] = 0  # the target's features hold the constant; the draft makes its own
        pairs = torch.cat([old_channels, old_channels + width])
        grown["wz"] = self.inputs(old["wz"], (width, 2 * width), old_channels, pairs)
        grown["norm"] = self.norm(old["norm"])
        return grown

    def add_constant(self, layer: Weights, y: Tensor, level: float, trained: bool = True) -> None:
        """Make the `layer` add a positive number, on text at least `level`, to the last channel.

        Units with the same weights r for gate and up give SiLU(r y) r y >= 0, and the sum over many random r is nearly
        a function of the length of y alone, which the norm before it has fixed. The LM head's padded rows read the
        channel with a big negative weight; nothing else does.

        y [T, D] is what the layer's feed-forward part reads on real text.
        """
        free = self.shape.intermediate_size - (self.source.intermediate_size if trained else 0)
        count = min(CONSTANT_UNITS, free - free // 2)  # behind the silent ones
        rows = layer["gate_proj"][-count:]
        # Of a size that 8-bit weights, and their scales in float16, hold well.
        weights = (torch.rand(count, generator=self._random) + 0.5) * 0.05
        z = y @ rows.T  # [T, count]
        factor = 1.0
        for _ in range(20):
            value = (functional.silu(factor * z) * (factor * z)) @ weights
            factor *= math.sqrt(level / float(value.min()))
        layer["gate_proj"][-count:] *= factor
        layer["up_proj"][-count:] *= factor  # its own numbers on padded channels: OpenVINO merges equal matrices
        layer["up_proj"][-count:, : self.source.hidden_size] = layer["gate_proj"][-count:, : self.source.hidden_size]
        layer["down_proj"][-1, -count:] = weights


def _check_room_for_constant(source: Shape, shape: Shape) -> None:
    """Padded tokens need a padded channel, and free units in the last layer of the target and of the draft."""
    units = source.intermediate_size + 2 * MIN_CONSTANT_UNITS
    if shape.hidden_size == source.hidden_size or shape.intermediate_size < units:
        raise UserError(
            f"expected a hidden size above {source.hidden_size} and at least {units} feed-forward units to keep "
            f"{shape.vocab_size - source.vocab_size} padded tokens away, got {shape.hidden_size} and "
            f"{shape.intermediate_size}; choose a bigger shape or the source's vocabulary"
        )
