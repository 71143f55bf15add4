"""Muon: momentum whose update is orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024, "Muon").

torch's own Muon iterates in bfloat16, which many CPUs emulate slowly; here the caller chooses. Matrices of one shape
are iterated as one batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # the paper's coefficients: singular values near 1 after five iterations


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[B, M, N] -> [B, M, N] of the same dtype with singular values near 1 and the singular vectors of the input."""
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights [M, N]; give embeddings, heads and vectors to AdamW. `iteration_dtype` is that of the matrix
    products alone.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        iteration_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._iteration_dtype = iteration_dtype
        for group in self.param_groups:
            assert all(p.ndim == 2 for p in group["params"]), "Muon takes matrices only"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # the closure form is not offered
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = []
                for parameter in parameters:
                    gradient, state = parameter.grad, self.state[parameter]
                    assert gradient is not None
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(gradient, 1 - momentum)
                    directions.append(gradient.lerp(state["momentum"], momentum))  # Nesterov
                updates = orthogonalise(torch.stack(directions).to(self._iteration_dtype))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - lr * group["weight_decay"])
                    parameter.add_(update.to(parameter.dtype), alpha=-lr * scale)
