"""Plain decoding beside several trees on held-out text, interleaved: tokens/s, accept length, and what a round costs.
Not a test: run it by hand.

Usage: python tests/compare_trees.py ARTIFACT [NUM_PROMPTS] [NODES,DEPTH,WIDTH ...]
"""

from __future__ import annotations

import statistics
import sys

from dovetail.export.figures import accept_length, held_out_prompts, repeated_share
from dovetail.runtime import load
from dovetail.runtime.generation import Generation
from dovetail.runtime.manifest import TreeShape
from dovetail.runtime.policy import FixedPolicy

NEW_TOKENS = 128
PLAIN = TreeShape(1, 0, 1)
SHAPES = [
    PLAIN,
    *(TreeShape(*shape) for shape in ((3, 2, 1), (4, 1, 3), (5, 2, 3), (8, 3, 3), (12, 5, 4), (16, 7, 10))),
]


def main() -> None:
    path, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20
    chosen = [TreeShape(*map(int, word.split(","))) for word in sys.argv[3:]]
    shapes = [PLAIN, *chosen] if chosen else SHAPES
    pipe = load(path, draft_device="cpu")
    prompts = held_out_prompts(count, 600)
    pipe.generate(prompts[0], max_new_tokens=NEW_TOKENS)  # the engines' first calls are slow
    print(f"{len(prompts)} held-out prompts, {NEW_TOKENS} tokens each, {pipe.threads} threads, medians over prompts")
    for temperature in (0.0, 1.0):
        made: dict[TreeShape, list[Generation]] = {shape: [] for shape in shapes}
        for seed, prompt in enumerate(prompts):
            for shape in shapes:  # interleaved: a slow moment hits every shape alike
                pipe.policy = FixedPolicy(shape)
                settings = {"temperature": temperature, "seed": seed, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
                made[shape].append(pipe.generate(prompt, **settings))
        report(temperature, made)


def report(temperature: float, made: dict[TreeShape, list[Generation]]) -> None:
    repeated = repeated_share([done.token_ids for done in made[PLAIN]])
    print(f"\ntemperature {temperature:g}, {repeated:.1%} repeated 8-grams")
    print("nodes depth width   tokens/s  over plain  accept length   verify   draft    host ms a round")
    for shape, done in made.items():
        speeds = [text.tokens_per_second for text in done]
        ratio = statistics.median(a / b.tokens_per_second for a, b in zip(speeds, made[PLAIN], strict=True))
        rounds = sum(text.totals.rounds for text in done)
        cost = [
            sum(getattr(text.totals, part) for text in done) / rounds for part in ("verify_ms", "draft_ms", "host_ms")
        ]
        print(
            f"{shape.nodes:5} {shape.depth:5} {shape.width:5} {statistics.median(speeds):10.1f} {ratio:11.2f} "
            f"{accept_length(done):14.2f} {cost[0]:8.2f} {cost[1]:7.2f} {cost[2]:7.2f}"
        )


if __name__ == "__main__":
    main()
