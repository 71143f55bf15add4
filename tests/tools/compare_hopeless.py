"""What a hopeless draft costs against never having had one: the pair's own draft with every drafted token replaced by
its neighbour in the vocabulary. Not a test: run it by hand.

Usage: python tests/tools/compare_hopeless.py ARTIFACT [NUM_PROMPTS]

Beside a pipeline without a draft, interleaved: one that found the profile which calibration writes for the hopeless
pair; and the adaptive policy it makes for the good one, as when a text turns into something that the draft knows
nothing of.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.calibration.choose import calibration as decision
from dovetail.calibration.measure.pair import PipelinePair
from dovetail.calibration.measure.prompts import passages_of
from dovetail.export.demo.acceptance import held_out_prompts
from dovetail.runtime import load
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.drafts.graph_contract import Children
from dovetail.runtime.drafts.onnxruntime_graph import OnnxRuntimeGraph
from dovetail.runtime.hardware.machine import this_machine
from dovetail.runtime.policies.host_profile import Engines, write

NEW_TOKENS = 512
TURN = 8  # tokens
TEXT: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0.0}


def spoil(call: Any, vocab_size: int) -> Any:
    """The draft's call with every child replaced."""

    def spoiled(self: OnnxRuntimeGraph, calls: Any) -> list[Children]:
        out: list[Children] = call(self, calls)
        return [Children((one.tokens + 1) % vocab_size, one.log_probs, one.first_row) for one in out]

    return spoiled


def main() -> None:
    path, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 6
    plain = load(path, draft="none", profile=None)
    pipe = load(path, draft="artifact", profile=None, sequences=16)
    prompts = held_out_prompts(max(count, 12), 600)
    tokens = [token for prompt in prompts for token in pipe.encode(prompt)]
    effort = decision.QUICK
    passages = passages_of("Python's standard library", tokens, effort.passages, effort.passage_tokens)
    pair = PipelinePair(pipe)
    settings = {"effort": effort, "default": pipe.artifact.manifest.default_tree, "temperatures": (0.0,)}
    good = decision.calibrate(pair, passages, **settings)  # type: ignore[arg-type]  # three keywords in one place
    vocab_size = pipe.artifact.manifest.target.vocab_size
    OnnxRuntimeGraph.run = spoil(OnnxRuntimeGraph.run, vocab_size)  # type: ignore[method-assign]
    bad = decision.calibrate(pair, passages, **settings)  # type: ignore[arg-type]
    for result in (good, bad):
        if result.too_noisy:
            sys.exit(result.too_noisy)
    print(f"good: {good.decisions[0].choice.summary}; hopeless: {bad.decisions[0].choice.summary}")
    engines = Engines(pipe.draft_device, pipe.target.numerics, pipe.target.acceptance, pipe.threads, pipe.threads)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "hopeless.json")
        write(decision.as_profile(bad, pipe.artifact.digest, this_machine(), engines), kept)
        profiled = load(path, draft="artifact", profile=kept)
    pipe.engine._planner = RoundPlanner(good.latency.costs)
    adaptive = good.decisions[0].candidates.adaptive.policy
    ratios: dict[str, list[float]] = {"with its profile": [], "adaptive, made for a good draft": []}
    for prompt in prompts[:count]:
        streams = (profiled.stream(prompt, **TEXT), pipe.stream(prompt, policy=adaptive, **TEXT))
        spent = in_turns({"plain": plain.stream(prompt, **TEXT), **dict(zip(ratios, streams, strict=True))})
        for name, found in ratios.items():
            found.append(spent["plain"] / spent[name])
    for name, found in ratios.items():
        low, _, high = np.percentile(found, [25, 50, 75])
        print(
            f"{name}: {statistics.median(found):.3f} of plain decoding (quartiles {low:.3f}, {high:.3f}), {count} texts"
        )


def in_turns(streams: dict[str, Stream]) -> dict[str, float]:
    """Seconds that each text took behind its first token. They are made a few tokens at a time, in turns: a moment in
    which the machine is slow hits all of them.
    """
    spent, left = dict.fromkeys(streams, 0.0), dict.fromkeys(streams, NEW_TOKENS)
    for name, stream in streams.items():
        left[name] -= len(next(iter(stream)).token_ids)
    while any(left.values()):
        goal = max(left.values()) - TURN
        for name, stream in list(streams.items()):
            start = time.perf_counter()
            while left[name] > max(goal, 0):
                left[name] -= len(next(iter(stream)).token_ids)
            spent[name] += time.perf_counter() - start
        streams = dict(reversed(streams.items()))
    return spent


if __name__ == "__main__":
    main()
