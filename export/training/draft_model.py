"""The draft as a torch module, which training needs: the first stage of its kind in front of a few Llama blocks, and a
norm behind them where the kind has one. `export/draft/onnx_graph.py` writes the same as a graph, from arrays.

Pair p is the target's feature of position p with the token of position p + 1 (EAGLE, arXiv 2401.15077); its rotary
position is p. Its output stands for the feature of position p + 1, and through the LM head for token p + 2. A draft of
kind `lm` reads the token of position p as pair p, without a feature.

Letters: B sequences, T pairs in a call, P pairs before them, D hidden size, V vocabulary, N tokens of the LM head, A
heads, H key/value heads, E head size, L target layers that a feature is made of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from dovetail.export.draft.config import DraftConfig, check_fits
from dovetail.export.draft.files import draft_source, read_trained
from dovetail.export.draft.kinds import KINDS
from dovetail.export.draft.weights import DraftWeights
from dovetail.export.training.fusions import FUSIONS, RMSNorm

Cache = list[tuple[Tensor, Tensor]]  # per block: keys (after RoPE) and values, [B, H, P, E]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Llama's half-split layout. x [B, heads, T, E]; cos, sin [T, E] (or [B, 1, T, E])."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Block(nn.Module):
    """A Llama block, or one of Qwen's with biases or normed heads. The first one of a draft reads what the kind's first
    stage gives, without a norm of its own.
    """

    def __init__(self, config: DraftConfig, first: bool) -> None:
        super().__init__()
        size, self._head_dim = config.hidden_size, config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        kind, bias = KINDS[config.kind], config.qkv_bias
        read = 2 * size if first and kind.first_block_reads_pair else size
        normed = not first or kind.first_block_norm
        self.input_norm = RMSNorm(size, config.rms_norm_eps) if normed else nn.Identity()
        self.q_proj = nn.Linear(read, queries, bias=bias)
        self.k_proj = nn.Linear(read, keys, bias=bias)
        self.v_proj = nn.Linear(read, keys, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(queries, size, bias=False)
        self.mlp_norm = RMSNorm(size, config.rms_norm_eps)
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)
        self._grouped = config.num_heads != config.num_kv_heads

    def forward(
        self,
        x: Tensor,
        read: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> (x [B, T, D], new keys, new values [B, H, T, E]). Attention reads `read`, None: the normed x.
        `mask` None is causal, without past.
        """
        batch, length, _ = x.shape
        y = self.input_norm(x) if read is None else read
        shape = (batch, length, -1, self._head_dim)
        queries = rotate(self.q_norm(self.q_proj(y).view(shape)).transpose(1, 2), cos, sin)
        new_keys = rotate(self.k_norm(self.k_proj(y).view(shape)).transpose(1, 2), cos, sin)
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
    """The trained part, and beside it the embedding and the LM head. These are the target's, frozen and not saved; but
    of a kind with a head of its own that is a trained part, too.
    """

    embedding: Tensor
    lm_head: Tensor
    head_tokens: Tensor | None

    def __init__(
        self, config: DraftConfig, embedding: Tensor, lm_head: Tensor, head_tokens: Tensor | None = None
    ) -> None:
        """`embedding` [V, D]; `lm_head` [V, D], or [N, D] with rows for `head_tokens` [N] alone. Raises `UserError` if
        they do not fit the config.
        """
        super().__init__()
        check_fits(config, *embedding.shape)
        rows = config.vocab_size if head_tokens is None else len(head_tokens)
        assert lm_head.shape == (rows, config.hidden_size), f"an LM head of {tuple(lm_head.shape)}"
        assert config.head_size in (None, rows), "the config says another size of the head"
        self.config, self.kind = config, KINDS[config.kind]
        self.fusion = FUSIONS[config.kind](config)
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.num_layers))
        normed = self.kind.output_norm
        self.output_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if normed else nn.Identity()
        self.projection = (
            nn.Linear(len(config.feature_layers) * config.hidden_size, config.hidden_size, bias=False)
            if config.feature_layers
            else nn.Identity()
        )
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.register_buffer("head_tokens", head_tokens, persistent=config.head_size is not None)
        if self.kind.has_own_head(config):
            self.lm_head = nn.Parameter(lm_head.detach().clone())
        else:
            self.register_buffer("lm_head", lm_head.detach(), persistent=False)

    def project(self, features: Tensor) -> Tensor:
        """What the target's graph gives: the inputs of the feature layers side by side [..., L * D] projected to
        [..., D]; other kinds take the target's features as they are.
        """
        projected: Tensor = self.projection(features)
        return projected

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor | None,
        position_ids: Tensor,
        mask: Tensor | None = None,
        past: Cache | None = None,
    ) -> tuple[Tensor, Cache]:
        """(predicted features [B, T, D], the new keys and values of each block).

        input_ids [B, T] int64, features [B, T, D] (None for `lm`), position_ids [T] int64, mask [T, P + T] bool (True =
        may attend; None: causal, P = 0).
        """
        x, read = self.fusion(features, functional.embedding(input_ids, self.embedding))
        frequencies = torch.tensor(self.config.rope_frequencies, dtype=torch.float32)
        angles = position_ids.float()[:, None] * frequencies  # [T, E / 2]
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = (
            (angles.cos() * self.config.rope_scale).to(x.dtype),
            (angles.sin() * self.config.rope_scale).to(x.dtype),
        )
        new: Cache = []
        for i, block in enumerate(self.blocks):
            x, keys, values = block(x, read, cos, sin, mask, None if past is None else past[i])
            new.append((keys, values))
            read = None
        return x, new

    def logits(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., V], or [..., N] where the LM head has rows for N tokens."""
        return functional.linear(self.output_norm(features), self.lm_head)

    def num_parameters(self) -> int:
        """Weights of the trained part."""
        return sum(p.numel() for p in self.parameters())


def join(caches: Sequence[Cache]) -> Cache:
    """Caches of successive calls as one."""
    return [
        (torch.cat([c[i][0] for c in caches], dim=2), torch.cat([c[i][1] for c in caches], dim=2))
        for i in range(len(caches[0]))
    ]


def save_draft(model: DraftModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `config.json` and `model.safetensors`: the trained part alone, in `dtype`, and the tokens of its head."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n", encoding="utf-8")


def load_draft(folder: Path, embedding: Tensor, lm_head: Tensor) -> DraftModel:
    """Read a draft folder that `save_draft` wrote, for the target whose embedding and LM head are given.

    Raises `UserError` if it is not one, or not for this target. Other layouts: `draft/layouts.py`.
    """
    return as_module(read_trained(draft_source(folder), embedding.numpy(), lm_head.numpy()))


def as_module(weights: DraftWeights) -> DraftModel:
    """The torch module with these weights, to be evaluated."""
    tokens = None if weights.head_tokens is None else torch.from_numpy(weights.head_tokens.copy())
    matrices = torch.from_numpy(weights.embedding), torch.from_numpy(weights.lm_head)
    model = DraftModel(weights.config, *matrices, tokens)
    trained = {name: torch.from_numpy(array) for name, array in weights.tensors.items()}
    if weights.config.head_size is not None and tokens is not None:
        trained["head_tokens"] = tokens
    if KINDS[weights.config.kind].has_own_head(weights.config):
        trained["lm_head"] = matrices[1]
    model.load_state_dict(trained)
    return model.eval()
