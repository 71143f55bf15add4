"""Artifacts of one target with drafts of several kinds: accept length, also with features from elsewhere in the text
(a draft that reads them rightly is far better than that), what a round costs, and tokens/s over plain decoding.
Interleaved, on held-out text. Not a test: run it by hand.

Usage: python tests/tools/compare_kinds.py NODES,DEPTH,WIDTH NUM_PROMPTS ARTIFACT ...
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np

from dovetail.export.demo.acceptance import accept_length, held_out_prompts
from dovetail.runtime import load, pipeline
from dovetail.runtime.decoding.generation import Generation
from dovetail.runtime.drafts.graph_contract import DraftGraph
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.evaluation.repetition import repeated_share
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Float32s
from dovetail.runtime.trees.verified import Verified

NEW_TOKENS = 128


class MisledDraft(ModelDraft):
    """A draft that is told of the target's features of other positions."""

    def __init__(self, graph: DraftGraph) -> None:
        super().__init__(graph)
        self._pool: list[Float32s] = []
        self._random = np.random.default_rng(0)

    def tell(self, verified: Verified) -> None:
        """See `Draft`."""
        features = verified.features
        if len(features):
            self._pool.append(features.copy())
            pool = np.concatenate(self._pool)
            features = pool[self._random.integers(0, len(pool), len(features))]
        super().tell(Verified(verified.begin, verified.tokens, features))


def main() -> None:
    tree, count, paths = TreeShape(*map(int, sys.argv[1].split(","))), int(sys.argv[2]), sys.argv[3:]
    prompts = held_out_prompts(count, 600)
    plain = load(paths[0], draft="none", ctx_size=1024)
    pipes = {
        Path(path).name: load(path, draft="artifact", tree=tree, profile=None, draft_device="cpu", ctx_size=1024)
        for path in paths
    }
    for pipe in (plain, *pipes.values()):
        pipe.generate(prompts[0], max_new_tokens=NEW_TOKENS)
    print(f"tree {sys.argv[1]}, {len(prompts)} held-out prompts, {NEW_TOKENS} tokens each, {plain.threads} threads")
    print("temperature  artifact          accept length  features elsewhere   draft ms  verify ms a round  over plain")
    for temperature in (0.0, 1.0):
        alone: list[Generation] = []
        made: dict[str, list[Generation]] = {name: [] for name in pipes}
        misled: dict[str, list[Generation]] = {name: [] for name in pipes}
        for seed, prompt in enumerate(prompts):
            settings = {"temperature": temperature, "seed": seed, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
            alone.append(plain.generate(prompt, **settings))
            for name, pipe in pipes.items():
                made[name].append(pipe.generate(prompt, **settings))
                misled[name].append(mislead(pipe, prompt, settings))
        for name, done in made.items():
            rounds = sum(text.totals.rounds for text in done)
            draft, verify = (sum(getattr(t.totals, part) for t in done) / rounds for part in ("draft_ms", "verify_ms"))
            over = statistics.median(
                a.tokens_per_second / b.tokens_per_second for a, b in zip(done, alone, strict=True)
            )
            print(
                f"{temperature:11g}  {name:17} {accept_length(done):13.2f} {accept_length(misled[name]):19.2f} "
                f"{draft:10.2f} {verify:18.2f} {over:11.2f}",
                flush=True,
            )
        print(f"{repeated_share([text.token_ids for text in alone]):.1%} repeated 8-grams in the plain texts")


def mislead(pipe: Pipeline, prompt: str, settings: dict[str, object]) -> Generation:
    """The same text with the features mixed up."""
    pipeline.ModelDraft = MisledDraft  # type: ignore[misc]  # a tool that looks inside
    try:
        return pipe.generate(prompt, **settings)  # type: ignore[arg-type]  # a string gives one text
    finally:
        pipeline.ModelDraft = ModelDraft  # type: ignore[misc]


if __name__ == "__main__":
    main()
