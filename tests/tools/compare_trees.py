"""Plain decoding beside several trees and policies on held-out text, interleaved: tokens/s, accept length, and what a
round costs. Not a test: run it by hand.

Usage: python tests/tools/compare_trees.py ARTIFACT [NUM_PROMPTS] [TREE ...]

A TREE is NODES,DEPTH,WIDTH; or `profile` for what `dovetail calibrate` chose on this machine (`profile=FILE` for a
file's choice), `paper` for the paper's 16,7,10, or `sweep` for chains and a grid of nodes x depth x width. Where a
profile is among them, the last lines compare its choice with the best of all, and the speed it foretold with what was
measured.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from dovetail.export.demo.acceptance import accept_length, held_out_prompts
from dovetail.runtime import load
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.decoding.generation import Generation
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.evaluation.repetition import repeated_share
from dovetail.runtime.hardware.machine import this_machine
from dovetail.runtime.pipeline import UNMEASURED_GAIN
from dovetail.runtime.policies import host_profile as profile
from dovetail.runtime.policies.base import PLAIN_TREE, Policy
from dovetail.runtime.policies.host_profile import HostProfile
from dovetail.runtime.trees.shape import TreeShape

NEW_TOKENS = 128
PAPER = TreeShape(16, 7, 10)
DEFAULT = [
    PLAIN_TREE,
    *(TreeShape(*shape) for shape in ((3, 2, 1), (4, 1, 3), (5, 2, 3), (8, 3, 3), (12, 5, 4))),
    PAPER,
]
CHAINS = [TreeShape(depth + 1, depth, 1) for depth in (1, 2, 3, 4, 6, 8, 10)]
TREES = [TreeShape(*shape) for shape in itertools.product((4, 8, 12, 16), (1, 2, 3, 5, 7), (3, 6))]

Of = Callable[[float], Policy]
"""The policy for texts of one temperature."""


def main() -> None:
    path, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20
    found: HostProfile | None = None
    shapes = [PLAIN_TREE]
    for word in sys.argv[3:]:
        if word.startswith("profile"):
            found = profile_of(path, word.partition("=")[2])
        elif word == "paper":
            shapes.append(PAPER)
        elif word == "sweep":
            shapes += CHAINS + [s for s in TREES if s.width < s.nodes and s.depth < s.nodes <= offered(s) + 1]
        else:
            shapes.append(TreeShape(*map(int, word.split(","))))
    if not sys.argv[3:]:
        shapes = DEFAULT
    pipe = load(path, draft="artifact", draft_device=found.engines.draft_device if found else "cpu", profile=None)
    policies: dict[str, Of] = {label(shape): lambda _, shape=shape: policy(shape) for shape in shapes}
    if found is not None:
        policies["profile"] = lambda temperature: found.choice(temperature).policy
        pipe.engine._planner = RoundPlanner(found.costs)
    prompts = held_out_prompts(count, 600)
    pipe.generate(prompts[0], max_new_tokens=NEW_TOKENS)  # the engines' first calls are slow
    print(f"{len(prompts)} held-out prompts, {NEW_TOKENS} tokens each, {pipe.threads} threads, medians over prompts")
    for temperature in (0.0, 1.0):
        made: dict[str, list[Generation]] = {name: [] for name in policies}
        for seed, prompt in enumerate(prompts):
            for name, of in policies.items():  # interleaved: a slow moment hits every policy alike
                settings = {"temperature": temperature, "seed": seed, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
                made[name].append(pipe.stream(prompt, policy=of(temperature), **settings).finish())
        report(temperature, made)
        if found is not None:
            judge(found, temperature, made)


def policy(shape: TreeShape) -> Policy:
    """As of a user who asks for this tree."""
    return Policy("plain") if shape == PLAIN_TREE else Policy("fixed", shape, gain=UNMEASURED_GAIN, is_wish=True)


def offered(shape: TreeShape) -> int:
    """Candidates that so deep and wide a tree has."""
    return shape.width + (shape.depth - 1) * shape.width**2


def label(shape: TreeShape) -> str:
    return f"{shape.nodes},{shape.depth},{shape.width}" if shape != PLAIN_TREE else "plain"


def profile_of(path: str, file: str) -> HostProfile:
    if file:
        return profile.read(Path(file))
    found = profile.find(open_artifact(path).digest, this_machine(), "cpu", "fast", "confirmed")
    if found is None:
        sys.exit(f"expected a profile of {path}, got none; run dovetail calibrate {path}")
    return found


def over_plain(done: list[Generation], plain: list[Generation]) -> float:
    return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(done, plain, strict=True))


def report(temperature: float, made: dict[str, list[Generation]]) -> None:
    repeated = repeated_share([done.token_ids for done in made["plain"]])
    print(f"\ntemperature {temperature:g}, {repeated:.1%} repeated 8-grams")
    print("nodes,depth,width   tokens/s  over plain  accept length   verify   draft    host ms a round")
    for name, done in made.items():
        speed = statistics.median(text.tokens_per_second for text in done)
        rounds = sum(text.totals.rounds for text in done)
        cost = [
            sum(getattr(text.totals, part) for text in done) / rounds for part in ("verify_ms", "draft_ms", "host_ms")
        ]
        print(
            f"{name:17} {speed:10.1f} {over_plain(done, made['plain']):11.2f} "
            f"{accept_length(done):14.2f} {cost[0]:8.2f} {cost[1]:7.2f} {cost[2]:7.2f}"
        )


def judge(found: HostProfile, temperature: float, made: dict[str, list[Generation]]) -> None:
    choice = found.choice(temperature)
    ratios = {name: over_plain(done, made["plain"]) for name, done in made.items()}
    best = max(ratios, key=ratios.__getitem__)
    measured = statistics.median(text.tokens_per_second for text in made["profile"])
    print(f"{choice.summary}: {ratios['profile'] / ratios[best]:.3f} of the best, {best}")
    print(
        f"foretold {choice.predicted:.1f} tokens/s, {choice.predicted / choice.plain_predicted:.2f} times plain; "
        f"measured {measured:.1f}, {ratios['profile']:.2f} times"
    )


if __name__ == "__main__":
    main()
