"""The cross-entropy of a draft's guesses against what the target expects, without ever holding all logits.

Letters: M rows, D hidden size, N tokens of the LM head, K tokens expected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 22  # logits at a time: 16 MB, which stay in the caches of a CPU


class _SoftCrossEntropy(torch.autograd.Function):
    """Both passes at once, a chunk of rows after the other: softmax is computed once, gradients come out of it."""

    @staticmethod
    def forward(ctx: Any, guess: Tensor, head: Tensor, expected: Tensor, chances: Tensor, weights: Tensor) -> Tensor:
        total, scale = torch.zeros(()), weights.sum().clamp_min(1e-9)
        needs_guess, needs_head = ctx.needs_input_grad[:2]
        by_guess = torch.empty_like(guess) if needs_guess else None
        by_head = torch.zeros_like(head) if needs_head else None
        size = max(1, _CHUNK // len(head))
        for begin in range(0, len(guess), size):
            part = slice(begin, begin + size)
            logits = guess[part] @ head.T  # [m, N]
            wide = logits.float()
            mass = chances[part].sum(-1, keepdim=True)  # of the expected tokens that the head has
            spread = torch.logsumexp(wide, -1, keepdim=True)
            said = (chances[part] * wide.gather(1, expected[part])).sum(-1, keepdim=True)
            total += (weights[part, None] * (mass * spread - said)).sum()
            if by_guess is None and by_head is None:
                continue
            slope = wide.sub_(spread).exp_().mul_(mass)
            slope.scatter_add_(1, expected[part], -chances[part])
            slope = slope.mul_(weights[part, None] / scale).to(head.dtype)
            if by_guess is not None:
                by_guess[part] = slope @ head
            if by_head is not None:
                by_head += slope.T @ guess[part]
        ctx.save_for_backward(by_guess, by_head)
        return total / scale

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        by_guess, by_head = ctx.saved_tensors
        return (
            None if by_guess is None else by_guess * slope.to(by_guess.dtype),
            None if by_head is None else by_head * slope.to(by_head.dtype),
            None,
            None,
            None,
        )


def soft_cross_entropy(guess: Tensor, head: Tensor, expected: Tensor, chances: Tensor, weights: Tensor) -> Tensor:
    """The mean over rows, weighted by `weights` [M], of -sum over k of chances[k] * log q[expected[k]], where q is the
    softmax of `guess` [M, D] through the LM head [N, D].

    `expected` [M, K] int64 are rows of the head, each at most once where its chance is not 0, `chances` [M, K] the
    target's own. Chances that are left out (tokens that the head lacks) make a row count less.
    """
    loss: Tensor = _SoftCrossEntropy.apply(guess, head, expected, chances, weights)
    return loss
