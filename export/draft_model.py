"""The draft as a torch module: Dynamic Gating Fusion (Dovetail, arXiv 2412.18934, section 3.2) in front of a few Llama
blocks.

Pair p is the target's feature of position p with the token of position p + 1 (EAGLE, arXiv 2401.15077); its rotary
position is p. Its output is a guess of the feature of position p + 1, and through the target's LM head of token p + 2.

Letters: B sequences, T pairs in a call, P pairs before them, D hidden size, V vocabulary, A heads, H key/value heads, E
head size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dovetail.runtime.errors import UserError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

Cache = list[tuple[Tensor, Tensor]]  # per block: keys (after RoPE) and values, [B, H, P, E]


@dataclasses.dataclass(frozen=True, slots=True)
class DraftConfig:
    """The draft's sizes; stored as `config.json` beside `model.safetensors`. `rope_frequencies` are radians per
    position, E / 2 of them.
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

    def __post_init__(self) -> None:
        if self.kind != "dgf":
            raise UserError(f"expected a draft of kind dgf, got {self.kind!r}; train one with dovetail-export draft")
        if (
            self.num_layers < 1
            or self.num_heads % max(1, self.num_kv_heads)
            or len(self.rope_frequencies) * 2 != self.head_dim
        ):
            raise UserError(
                "expected a draft config with whole heads per key/value head and head_dim / 2 frequencies; train the "
                "draft again"
            )


def config_for(target: Any, num_blocks: int) -> DraftConfig:
    """A draft for a target's transformers config (Llama family): the same widths, heads and rotary frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if num_blocks < 1:
        raise UserError(f"expected at least one block, got --blocks {num_blocks}; the paper uses 1 to 5")
    head_dim = getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads
    rope = target.rope_parameters
    if rope.get("rope_type", "default") == "default":
        frequencies, scale = (
            1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim),
            1.0,
        )
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](target, torch.device("cpu"), seq_len=None)
    if len(frequencies) * 2 != head_dim:  # partly rotated heads (Phi-3 small, GLM): the rest stands still
        frequencies = torch.cat(
            [frequencies.double(), torch.zeros(head_dim // 2 - len(frequencies), dtype=torch.float64)]
        )
    return DraftConfig(
        kind="dgf",
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_layers=num_blocks,
        num_heads=target.num_attention_heads,
        num_kv_heads=getattr(target, "num_key_value_heads", None) or target.num_attention_heads,
        head_dim=head_dim,
        vocab_size=target.vocab_size,
        rms_norm_eps=target.rms_norm_eps,
        rope_frequencies=tuple(float(f) for f in frequencies),
        rope_scale=float(scale),
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever comes in."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide: Tensor = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return wide.to(x.dtype) * self.weight


class Fusion(nn.Module):
    """DGF: a gate per channel between the feature h and the token's embedding e. No biases.

    h1 = h W1;  h2 = SiLU(RMSNorm(e) W2);  z = sigmoid([h1; h2] Wz);  x = z * h1 + (1 - z) * h2
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.w1 = nn.Linear(size, size, bias=False)
        self.w2 = nn.Linear(size, size, bias=False)
        self.wz = nn.Linear(2 * size, size, bias=False)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        h1 = self.w1(features)
        h2 = functional.silu(self.w2(self.norm(embeddings)))
        z = torch.sigmoid(self.wz(torch.cat([h1, h2], dim=-1)))
        fused: Tensor = z * h1 + (1 - z) * h2
        return fused


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Llama's half-split layout. x [B, heads, T, E]; cos, sin [T, E] (or [B, 1, T, E])."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Block(nn.Module):
    """A Llama block; the draft's first has no input norm."""

    def __init__(self, config: DraftConfig, input_norm: bool) -> None:
        super().__init__()
        size, self._head_dim = config.hidden_size, config.head_dim
        self.input_norm = RMSNorm(size, config.rms_norm_eps) if input_norm else nn.Identity()
        self.q_proj = nn.Linear(size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, size, bias=False)
        self.mlp_norm = RMSNorm(size, config.rms_norm_eps)
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)
        self._grouped = config.num_heads != config.num_kv_heads

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> (x [B, T, D], new keys, new values [B, H, T, E]). `mask` None is causal, without past."""
        batch, length, _ = x.shape
        y = self.input_norm(x)
        shape = (batch, length, -1, self._head_dim)
        queries = rotate(self.q_proj(y).view(shape).transpose(1, 2), cos, sin)
        new_keys = rotate(self.k_proj(y).view(shape).transpose(1, 2), cos, sin)
        new_values = self.v_proj(y).view(shape).transpose(1, 2)
        keys = new_keys if past is None else torch.cat([past[0], new_keys], dim=2)
        values = new_values if past is None else torch.cat([past[1], new_values], dim=2)
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=self._grouped
        )
        x = x + self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        y = self.mlp_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y)), new_keys, new_values


class DraftModel(nn.Module):
    """The trained part, and beside it the target's frozen embedding and LM head (not saved: they are the target's)."""

    embedding: Tensor
    lm_head: Tensor
    head_tokens: Tensor | None

    def __init__(self, config: DraftConfig, embedding: Tensor, lm_head: Tensor) -> None:
        """`embedding` and `lm_head` are the target's, [V, D]. Raises `UserError` if they do not fit the config."""
        super().__init__()
        for weight in (embedding, lm_head):
            check_fits(config, weight.shape[0], weight.shape[1])
        self.config = config
        self.fusion = Fusion(config)
        self.blocks = nn.ModuleList(Block(config, input_norm=i > 0) for i in range(config.num_layers))
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.register_buffer("lm_head", lm_head.detach(), persistent=False)
        self.register_buffer("head_tokens", None, persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        past: Cache | None = None,
    ) -> tuple[Tensor, Cache]:
        """(predicted features [B, T, D], the new keys and values of each block).

        input_ids [B, T] int64, features [B, T, D], position_ids [T] int64, mask [T, P + T] bool (True = may attend;
        None: causal, P = 0).
        """
        x = self.fusion(features, functional.embedding(input_ids, self.embedding))
        frequencies = torch.tensor(self.config.rope_frequencies, dtype=torch.float32)
        angles = position_ids.float()[:, None] * frequencies  # [T, E / 2]
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = (
            (angles.cos() * self.config.rope_scale).to(x.dtype),
            (angles.sin() * self.config.rope_scale).to(x.dtype),
        )
        new: Cache = []
        for i, block in enumerate(self.blocks):
            x, keys, values = block(x, cos, sin, mask, None if past is None else past[i])
            new.append((keys, values))
        return x, new

    def keep_tokens(self, tokens: Tensor) -> None:
        """From now on the LM head has rows for `tokens` [N] alone; distributions are over them."""
        self.lm_head, self.head_tokens = self.lm_head[tokens].clone(), tokens

    def logits(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., V], or [..., N] after `keep_tokens`, by the LM head."""
        return functional.linear(features, self.lm_head)

    def num_parameters(self) -> int:
        """Weights of the trained part."""
        return sum(p.numel() for p in self.parameters())


def join(caches: Sequence[Cache]) -> Cache:
    """Caches of successive calls as one."""
    return [
        (torch.cat([c[i][0] for c in caches], dim=2), torch.cat([c[i][1] for c in caches], dim=2))
        for i in range(len(caches[0]))
    ]


def save_draft(model: DraftModel, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (the trained part alone)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> DraftConfig:
    """The config of a draft folder. Raises `UserError` if it is not one."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(
                f"expected a draft folder with {name}, got {folder} without it; train one with dovetail-export draft"
            )
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        document["rope_frequencies"] = tuple(document["rope_frequencies"])
        return DraftConfig(**document)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"expected {folder}/config.json to be a draft's, got {error}; train one with dovetail-export draft"
        ) from None


def check_fits(config: DraftConfig, vocab_size: int, hidden_size: int) -> None:
    """Raise `UserError` unless the draft was made for a target of these sizes."""
    pairs = (("vocabulary", config.vocab_size, vocab_size), ("hidden size", config.hidden_size, hidden_size))
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(f"draft {what} {ours} != target {what} {theirs}; train the draft for this target")


def load_draft(folder: Path, embedding: Tensor, lm_head: Tensor) -> DraftModel:
    """Read a draft folder for the target whose embedding and LM head are given.

    Raises `UserError` if it is not one, or not for this target.
    """
    model = DraftModel(read_config(folder), embedding, lm_head)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"expected {folder}/model.safetensors to fit its config, got: {first}; train the draft again"
        ) from None
    return model.eval()
