"""How well a draft guesses its target, measured by running the artifact on held-out text: rows for the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dovetail.export.training import corpus as corpora
from dovetail.runtime import load
from dovetail.runtime.decoding.generation import Generation
from dovetail.runtime.evaluation.repetition import NGRAM, repeated_share
from dovetail.runtime.trees.shape import TreeShape

TREE = TreeShape(nodes=12, depth=5, width=4)
NUM_PROMPTS, PROMPT_CHARACTERS, NEW_TOKENS = 40, 600, 128


def held_out_prompts(count: int, characters: int) -> list[str]:
    """`count` passages spread evenly over the standard library's held-out files."""
    texts = corpora.standard_library().held_out.values()
    starts = [text[i : i + characters] for text in texts for i in range(0, len(text) - characters, 2 * characters)]
    return starts[:: max(1, len(starts) // count)][:count]


def measure_acceptance(artifact: Path) -> dict[str, str]:
    """Rows `accept length ...`: greedy and at temperature 1, each beside the share of repeated 8-grams."""
    prompts = held_out_prompts(NUM_PROMPTS, PROMPT_CHARACTERS)
    rows = {}
    with load(artifact, draft="artifact", draft_device="cpu", tree=TREE) as pipe:
        for label, temperature in (("greedy", 0.0), ("at temperature 1", 1.0)):
            texts = [
                pipe.generate(prompt, temperature=temperature, seed=i, max_new_tokens=NEW_TOKENS, ignore_eos=True)
                for i, prompt in enumerate(prompts)
            ]
            repeated = repeated_share([text.token_ids for text in texts])
            rows[f"accept length {label}"] = (
                f"{accept_length(texts):.2f} (tree of {TREE.nodes} nodes, depth {TREE.depth}, width {TREE.width}; "
                f"{len(texts)} texts of {NEW_TOKENS} tokens; {repeated:.1%} of their {NGRAM}-grams are repeated)"
            )
    return rows


def accept_length(texts: Sequence[Generation]) -> float:
    """Mean accepted drafted tokens per round, the bonus token not counted."""
    return sum(text.totals.accepted_tokens for text in texts) / sum(text.totals.rounds for text in texts)
