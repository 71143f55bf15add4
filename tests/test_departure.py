"""Proves what `fast` numerics may cost: over 200 held-out prompts its greedy tokens are those of `exact` up to
near-ties, and says how often one flips.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from dovetail.export import corpus
from dovetail.runtime import load
from dovetail.runtime.processors import softmax
from dovetail.runtime.target import Numerics
from dovetail.runtime.tree import Tree, root_only

NUM_PROMPTS, NEW_TOKENS = 200, 48
NUMERICS: tuple[Numerics, ...] = ("fast", "exact")
LARGEST_MARGIN = 0.5  # logits: what rounding activations to 8 bits can move in this model, with room


def held_out_prompts() -> list[str]:
    texts = list(corpus.standard_library().held_out.values())
    starts = [text[i : i + 300] for text in texts for i in range(0, len(text) - 300, 1500)]
    return starts[:: max(1, len(starts) // NUM_PROMPTS)][:NUM_PROMPTS]


def test_fast_departs_from_exact_at_near_ties_only(shipped_artifact: Path) -> None:
    fast = load(shipped_artifact, numerics="fast", ctx_size=512)  # with its draft: batches of another size
    exact = load(shipped_artifact, numerics="exact", draft="none", ctx_size=512)
    prompts = held_out_prompts()
    assert len(prompts) == NUM_PROMPTS
    margins, tokens = [], 0
    for prompt in prompts:
        settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        quick, slow = (pipe.generate(prompt, **settings).token_ids for pipe in (fast, exact))
        same = next((i for i, (a, b) in enumerate(zip(quick, slow, strict=True)) if a != b), None)
        tokens += NEW_TOKENS if same is None else same + 1
        if same is not None:
            text = np.array(exact.tokenizer.encode(prompt) + slow[:same])
            sequence = exact.target.sequence()
            sequence.prefill(text[:-1])
            logits = sequence.verify(root_only(int(text[-1]))).logits[0]
            sequence.close()
            margins.append(float(logits[slow[same]] - logits[quick[same]]))
    print(
        f"greedy: fast departs from exact in {len(margins)} of {NUM_PROMPTS} texts, "
        f"once in {tokens / max(1, len(margins)):.0f} tokens; "
        f"margin there: median {np.median(margins or [0]):.4f}, largest {max(margins, default=0):.4f} logits"
    )
    assert max(margins, default=0) < LARGEST_MARGIN
    assert len(margins) < NUM_PROMPTS / 4


def test_a_sampled_text_of_fast_departs_where_two_tokens_arrive_together(shipped_artifact: Path) -> None:
    fast = load(shipped_artifact, numerics="fast", ctx_size=512)
    exact = load(shipped_artifact, numerics="exact", draft="none", ctx_size=512)
    prompts = held_out_prompts()[::2]
    departed, tokens = 0, 0
    for prompt in prompts:
        settings: dict[str, Any] = {"temperature": 1, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, "seed": 7}
        quick, slow = (pipe.generate(prompt, **settings).token_ids for pipe in (fast, exact))
        same = next((i for i, (a, b) in enumerate(zip(quick, slow, strict=True)) if a != b), None)
        departed += same is not None
        tokens += NEW_TOKENS if same is None else same + 1
    print(
        f"T = 1: fast departs from exact in {departed} of {len(prompts)} texts, once in {tokens / max(1, departed):.0f} tokens"
    )
    assert departed < 0.6 * len(prompts)  # a draw that feels every rounding departs in nearly all


def test_fast_distributions_are_those_of_exact_up_to_rounding(shipped_artifact: Path) -> None:
    """What sampling draws from: total variation and KL divergence over the last 32 tokens of held-out passages."""
    fast, exact = (load(shipped_artifact, numerics=n, draft="none", ctx_size=512) for n in NUMERICS)
    variations, divergences = [], []
    for prompt in held_out_prompts()[::5]:
        ids = np.array(fast.tokenizer.encode(prompt))
        begin, end = ids[:-32], ids[-32:]
        chain = Tree(end, np.arange(-1, len(end) - 1))
        rows = []
        for pipe in (fast, exact):
            sequence = pipe.target.sequence()
            sequence.prefill(begin)
            rows.append([softmax(row.astype(np.float64)) for row in sequence.verify(chain).logits])
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
