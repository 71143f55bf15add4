"""Proves what `fast` numerics cost. Within `fast` no text departs from plain decoding's (test_same_bytes.py), but its
activations are rounded to 8 bits, so a text may be another than in `exact`: seldom, at near-ties only, and drawn from
nearly the same distributions. Says how often, how near and how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from campaign import played

from dovetail.export.training import corpus
from dovetail.runtime import load
from dovetail.runtime.evaluation.likelihood import log_probs
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.sampling.processors import softmax
from dovetail.runtime.targets.base import Step, read
from dovetail.runtime.trees.tree import chain

NUM_PROMPTS, NEW_TOKENS = played(24, of=60), 48
LARGEST_MARGIN = 0.5  # logits: what rounding activations to 8 bits can move in this model, with room


def held_out_prompts() -> list[str]:
    texts = list(corpus.standard_library().held_out.values())
    starts = [text[i : i + 300] for text in texts for i in range(0, len(text) - 300, 1500)]
    return starts[:: max(1, len(starts) // NUM_PROMPTS)][:NUM_PROMPTS]


@pytest.fixture(scope="module")
def fast(shipped_artifact: Path) -> Iterator[Pipeline]:
    with load(shipped_artifact, numerics="fast", ctx_size=512) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def exact(shipped_artifact: Path) -> Iterator[Pipeline]:
    with load(shipped_artifact, numerics="exact", ctx_size=512, draft="none") as pipe:
        yield pipe


def departure(exact: Pipeline, prompt: str, text: list[int]) -> tuple[int, float] | None:
    """(where the `text` that `fast` wrote leaves the one that `exact` writes, by how much `exact` prefers its own token
    there), or None where it does not. Up to there both texts are one, so `exact` reads all of it at once.
    """
    ids = exact.encode(prompt)
    rows = np.concatenate(list(log_probs(exact.target, np.array(ids + text[:-1]))))[len(ids) - 1 :]
    for i, (row, token) in enumerate(zip(rows, text, strict=True)):
        own = int(row.argmax())
        if own != token:
            return i, float(row[own] - row[token])
    return None


def test_a_text_of_fast_departs_from_exact_at_near_ties_only(fast: Pipeline, exact: Pipeline) -> None:
    prompts = held_out_prompts()
    assert len(prompts) == NUM_PROMPTS
    texts = fast.generate(prompts, temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    found = [departure(exact, prompt, text.token_ids) for prompt, text in zip(prompts, texts, strict=True)]
    margins = [left[1] for left in found if left is not None]
    tokens = sum(NEW_TOKENS if left is None else left[0] + 1 for left in found)
    print(
        f"greedy: fast departs from exact in {len(margins)} of {NUM_PROMPTS} texts, "
        f"once in {tokens / max(1, len(margins)):.0f} tokens; "
        f"margin there: median {np.median(margins or [0]):.4f}, largest {max(margins, default=0):.4f} logits"
    )
    assert max(margins, default=0) < LARGEST_MARGIN
    assert len(margins) < 0.4 * NUM_PROMPTS


def test_fast_distributions_are_those_of_exact_up_to_rounding(fast: Pipeline, exact: Pipeline) -> None:
    """What sampling draws from: total variation and KL divergence over the last 32 tokens of held-out passages."""
    variations, divergences = [], []
    for prompt in held_out_prompts()[::3]:
        ids = np.array(fast.tokenizer.encode(prompt))
        begin, end = ids[:-32], ids[-32:]
        rows = []
        for pipe in (fast, exact):
            sequence = pipe.target.sequence()
            read(pipe.target, sequence, begin)
            (out,) = pipe.target.forward([Step(sequence, chain(end))])
            rows.append([softmax(row.astype(np.float64)) for row in out.logits])
            sequence.close()
        for p, q in zip(*rows, strict=True):
            variations.append(0.5 * float(np.abs(p - q).sum()))
            divergences.append(float((q * np.log(q / p)).sum()))
    print(
        f"fast against exact over {len(variations)} held-out positions: total variation {np.mean(variations):.4f}, "
        f"KL {np.mean(divergences):.5f} nats"
    )
    assert np.mean(variations) < 0.03
    assert np.mean(divergences) < 0.003
