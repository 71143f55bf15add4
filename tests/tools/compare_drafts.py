"""What one call of an artifact's draft costs by engine, rows and context, beside one pass of its target. Interleaved,
medians. Not a test: run it by hand.

Usage: python tests/tools/compare_drafts.py ARTIFACT [CONTEXT ...] [--devices cpu,openvino:CPU,cuda]
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from dovetail.runtime import load
from dovetail.runtime.artifact.manifest import DRAFT_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.drafts.joint_calls import JointCalls
from dovetail.runtime.drafts.loading import load_draft
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.policies.base import DepthBudget
from dovetail.runtime.targets.base import Step, read
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import root_only
from dovetail.runtime.trees.verified import Verified

REPEATS = 15
SHAPES = [TreeShape(12, depth, width) for width in (1, 4, 10) for depth in (1, 5)]


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--devices")]
    chosen = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith("--devices=")]
    devices = chosen[0].split(",") if chosen else ["cpu", "openvino:CPU"]
    contexts = [int(word) for word in words[1:]] or [200]
    artifact = open_artifact(words[0])
    info = artifact.manifest.draft
    assert info is not None
    longest = max(contexts) + 200
    settings = {"threads": 2, "context_length": longest}
    graphs = {name: load_draft(artifact.file(DRAFT_MODEL), info, device=name, **settings) for name in devices}
    calls = {name: JointCalls(graph) for name, graph in graphs.items()}
    pipe = load(words[0], draft="none", ctx_size=min(longest, artifact.manifest.target.context_length))
    rng = np.random.default_rng(0)
    print(f"{artifact.manifest.name}, draft {info.parameters / 1e6:.0f} M parameters besides embedding and head")
    print("context  depth x width  " + "".join(f"{name:>14}" for name in devices) + "   target pass, ms")
    for context in contexts:
        tokens = rng.integers(0, info.vocab_size, context)
        features = rng.standard_normal((context, info.hidden_size)).astype(np.float32)
        target = pipe.target.sequence()
        read(pipe.target, target, tokens % artifact.manifest.target.vocab_size)
        drafts = {name: ModelDraft(graph) for name, graph in graphs.items()}
        for name, draft in drafts.items():
            for begin in range(0, context - 1, 128):  # of a long text at once it would read the end alone
                end = min(begin + 128, context - 1)
                draft.tell(Verified(begin, tokens[begin : end + 1], features[begin:end]))
                calls[name].grow([draft.grow(int(tokens[end]), DepthBudget(1, 1))], 1)
        new = Verified(context - 1, tokens[-3:], features[-2:])
        times: dict[tuple[TreeShape, str], list[float]] = {(s, n): [] for s in SHAPES for n in [*devices, "target"]}
        for _ in range(REPEATS):
            for shape in SHAPES:
                for name, draft in drafts.items():
                    known, start = draft.known, time.perf_counter()
                    draft.tell(new)
                    growth = draft.grow(int(tokens[-1]), DepthBudget(shape.depth, shape.width))
                    calls[name].grow([growth], shape.width)
                    growth.candidates.best(shape.nodes - 1)
                    times[shape, name].append(1e3 * (time.perf_counter() - start))
                    draft.truncate(known)
                start = time.perf_counter()
                pipe.target.forward([Step(target, root_only(3))])
                times[shape, "target"].append(1e3 * (time.perf_counter() - start))
        for shape in SHAPES:
            row = "".join(f"{statistics.median(times[shape, name]):14.2f}" for name in devices)
            target_ms = statistics.median(times[shape, "target"])
            print(f"{context:7}  {shape.depth} x {shape.width:<11} {row}   {target_ms:.2f}")
        target.close()
        for draft in drafts.values():
            draft.close()


if __name__ == "__main__":
    main()
