"""The first stages of drafts as torch modules, one a kind. As graphs they are in `export/draft/kinds/`, whose `base.py`
says what a stage gives; tests hold the two against one another.

Letters: T pairs in a call, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dovetail.export.draft.config import DraftConfig


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


class DynamicGatingFusion(nn.Module):
    """h1 = h W1;  h2 = SiLU(RMSNorm(e) W2);  z = sigmoid([h1; h2] Wz);  x = z * h1 + (1 - z) * h2.  No biases."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.w1 = nn.Linear(size, size, bias=False)
        self.w2 = nn.Linear(size, size, bias=False)
        self.wz = nn.Linear(2 * size, size, bias=False)

    def forward(self, features: Tensor, embeddings: Tensor) -> tuple[Tensor, None]:
        h1 = self.w1(features)
        h2 = functional.silu(self.w2(self.norm(embeddings)))
        z = torch.sigmoid(self.wz(torch.cat([h1, h2], dim=-1)))
        return z * h1 + (1 - z) * h2, None


class ConcatFusion(nn.Module):
    """x = [e; h] W + b."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fusion_bias)

    def forward(self, features: Tensor, embeddings: Tensor) -> tuple[Tensor, None]:
        return self.fc(torch.cat([embeddings, features], dim=-1)), None


class NormedPair(nn.Module):
    """The stream is h or, with `norm_before_residual`, RMSNorm(h); attention reads [RMSNorm(e); RMSNorm(h)]."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.token_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feature_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._normed_stream = config.norm_before_residual

    def forward(self, features: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        h = self.feature_norm(features)
        return h if self._normed_stream else features, torch.cat([self.token_norm(embeddings), h], dim=-1)


class TokensAlone(nn.Module):
    """x = e."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()

    def forward(self, features: None, embeddings: Tensor) -> tuple[Tensor, None]:
        return embeddings, None


FUSIONS: dict[str, Callable[[DraftConfig], nn.Module]] = {
    "dgf": DynamicGatingFusion,
    "eagle": ConcatFusion,
    "eagle3": NormedPair,
    "lm": TokensAlone,
}
"""Kind of draft -> its first stage."""
