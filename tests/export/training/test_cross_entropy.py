"""Proves that the cross-entropy without all logits is torch's own, value and gradients, whatever the chunks."""

from __future__ import annotations

import pytest
import torch

from dovetail.export.training import cross_entropy
from dovetail.export.training.cross_entropy import soft_cross_entropy

ROWS, SIZE, VOCAB = 7, 8, 50


@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 1 << 22])
def test_it_is_the_cross_entropy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK", chunk)
    torch.manual_seed(0)
    head, guess = torch.randn(VOCAB, SIZE, requires_grad=True), torch.randn(ROWS, SIZE, requires_grad=True)
    target = torch.randn(ROWS, VOCAB).softmax(-1)
    weights = torch.tensor([1.0, 0.2, 0.0, 1.0, 1.0, 0.2, 1.0])
    chances, expected = target.sort(descending=True)
    ours = soft_cross_entropy(guess, head, expected, chances, weights)
    rows = torch.nn.functional.cross_entropy(guess @ head.T, target, reduction="none")
    theirs = (rows * weights).sum() / weights.sum()
    torch.testing.assert_close(ours, theirs)
    for mine, right in zip(
        torch.autograd.grad(3 * ours, (guess, head)), torch.autograd.grad(3 * theirs, (guess, head)), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)


def test_tokens_that_the_head_lacks_pull_nothing() -> None:
    """Their chances are 0, the row they are given counts no more for it."""
    torch.manual_seed(0)
    head, guess = torch.randn(VOCAB, SIZE), torch.randn(2, SIZE, requires_grad=True)
    expected = torch.tensor([[4, 9, 0], [7, 0, 0]])
    chances = torch.tensor([[0.5, 0.3, 0.0], [0.9, 0.0, 0.0]])
    ours = soft_cross_entropy(guess, head, expected, chances, torch.ones(2))
    log_q = (guess @ head.T).log_softmax(-1)
    theirs = -(0.5 * log_q[0, 4] + 0.3 * log_q[0, 9] + 0.9 * log_q[1, 7]) / 2
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, guess)[0] for loss in (ours, theirs)))
