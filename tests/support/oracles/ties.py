"""What an oracle's greedy text is compared with: ours, up to a near-tie."""

from __future__ import annotations

import numpy as np

from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.targets.base import Step, read
from dovetail.runtime.trees.tree import root_only

COUNT = 64
TIE = 1e-3  # logits


def assert_same_or_tied(pipe: Pipeline, prompt: list[int], ours: list[int], theirs: list[int]) -> int:
    """Tokens compared: up to the first difference, where the margin of the two best logits must be below `TIE`."""
    assert len(theirs) == COUNT
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            sequence = pipe.target.sequence()
            text = np.array(prompt + ours[:i])
            read(pipe.target, sequence, text[:-1])
            logits = pipe.target.forward([Step(sequence, root_only(int(text[-1])))])[0].logits[0]
            sequence.close()
            margin = logits[mine] - logits[other]
            assert 0 <= margin < TIE, f"token {i}: {mine} != {other}, {margin} apart"
            return i
    return COUNT
