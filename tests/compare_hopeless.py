"""What a hopeless draft costs against never having had one: the pair's own draft with every drafted token replaced by
its neighbour in the vocabulary. Not a test: run it by hand.

Usage: python tests/compare_hopeless.py ARTIFACT [NUM_PROMPTS]

Beside a pipeline without a draft, interleaved: one that found the profile which calibration writes for the hopeless
pair; and the dynamic policy it makes for the good one, as when a text turns into something that the draft knows
nothing of.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from dovetail.calibration import decision
from dovetail.calibration.latency import ROOM
from dovetail.calibration.pair import PipelinePair
from dovetail.export.figures import held_out_prompts
from dovetail.runtime import load
from dovetail.runtime.draft import Children, DraftSequence
from dovetail.runtime.machine import this_machine
from dovetail.runtime.profile import Engines, write

NEW_TOKENS = 512


def spoil(call: Any, vocab_size: int) -> Any:
    """The draft's call with every child replaced."""

    def spoiled(self: DraftSequence, given: Any) -> Children:
        out: Children = call(self, given)
        return Children((out.tokens + 1) % vocab_size, out.log_probs)

    return spoiled


def main() -> None:
    path, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 6
    plain = load(path, draft="none", profile=None)
    pipe = load(path, profile=None, sequences=3)
    prompts = held_out_prompts(max(count, 12), 600)
    tokens = [token for prompt in prompts for token in pipe.encode(prompt)]
    pair = PipelinePair(pipe, ROOM)
    settings = {"effort": decision.QUICK, "default": pipe.artifact.manifest.default_tree, "temperatures": (0.0,)}
    good = decision.calibrate(pair, tokens, **settings)  # type: ignore[arg-type]  # three keywords in one place
    DraftSequence._call = spoil(DraftSequence._call, pipe.artifact.manifest.target.vocab_size)  # type: ignore[method-assign]
    bad = decision.calibrate(pair, tokens, **settings)  # type: ignore[arg-type]
    for result in (good, bad):
        if result.too_noisy:
            sys.exit(result.too_noisy)
    print(f"good: {good.decisions[0].choice.summary}; hopeless: {bad.decisions[0].choice.summary}")
    engines = Engines(pipe.draft_device, pipe.target.numerics, pipe.threads, pipe.threads)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "hopeless.json")
        write(decision.as_profile(bad, pipe.artifact.digest, this_machine(), engines), kept)
        profiled = load(path, profile=kept)
    ratios: dict[str, list[float]] = {"with its profile": [], "dynamic, made for a good draft": []}
    for i, prompt in enumerate(prompts[:count]):
        pipe.policy = good.decisions[0].candidates.dynamic.make()
        speeds = {}
        turns = [("plain", plain), *zip(ratios, (profiled, pipe), strict=True)]
        for name, pipeline in turns if i % 2 else turns[::-1]:
            done = pipeline.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.0)
            speeds[name] = done.tokens_per_second
        for name, found in ratios.items():
            found.append(speeds[name] / speeds["plain"])
    for name, found in ratios.items():
        low, _, high = np.percentile(found, [25, 50, 75])
        print(
            f"{name}: {statistics.median(found):.3f} of plain decoding (quartiles {low:.3f}, {high:.3f}), {count} texts"
        )


if __name__ == "__main__":
    main()
