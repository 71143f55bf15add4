"""Where the milliseconds of a round go: one pass of the target and one call of the draft, operator by operator, by the
engines' own counters. Not a test: run it by hand.

Usage: python tests/profile_round.py ARTIFACT [NODES] [CONTEXT]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime as ort
from dovetail.runtime import load, target
from dovetail.runtime.draft_onnx import OnnxDraft
from dovetail.runtime.manifest import TreeShape
from dovetail.runtime.policy import FixedGrowth
from dovetail.runtime.tree import Tree

REPEATS = 15
LEAST = 0.01  # of the whole, for a line of its own


def main() -> None:
    path = sys.argv[1]
    nodes, context = (int(word) for word in (*sys.argv[2:4], *("9", "256")[len(sys.argv[2:4]) :]))
    target._PRECISION["fast"]["PERF_COUNT"] = "YES"
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "draft"))
        ort.SessionOptions = lambda: options
        pipe = load(path, draft_device="cpu", profile=None, trust=True, tree=TreeShape(nodes, nodes - 1, 1))
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, pipe.target.info.vocab_size, context)
        sequence = pipe.target.sequence()
        features = sequence.prefill(tokens).features
        chain = Tree(tokens[:nodes], np.arange(-1, nodes - 1))
        passes = []
        for _ in range(REPEATS):
            sequence.verify(chain)
            passes.append(
                [(op.node_type, op.real_time.total_seconds() * 1e3) for op in pipe.target._request.get_profiling_info()]
            )
        show(f"target: a pass over {nodes} nodes behind {context} tokens", passes)
        assert isinstance(pipe.draft, OnnxDraft)
        draft = pipe.draft.sequence()
        draft.propose(tokens, features[:-1], FixedGrowth(TreeShape(2, 1, 1)))
        for _ in range(REPEATS):
            known = draft.known
            draft.propose(tokens[-1:], features[-1:], FixedGrowth(TreeShape(2, 1, 1)))
            draft.truncate(known)
        events = json.loads(Path(pipe.draft.session.end_profiling()).read_text(encoding="utf-8"))
    show("draft: a call of one row", calls_of(events)[-REPEATS:])


def calls_of(events: list[dict]) -> list[list[tuple[str, float]]]:
    """Operators of each call, in ONNX Runtime's profile. An operator's event comes before the one of its call."""
    calls: list[list[tuple[str, float]]] = [[]]
    for event in events:
        if event["name"] == "model_run":
            calls.append([])
        elif event["name"].endswith("_kernel_time"):
            calls[-1].append((event["args"]["op_name"], event["dur"] / 1e3))
    return [call for call in calls if call]


def show(title: str, runs: list[list[tuple[str, float]]]) -> None:
    """Medians over the runs, by kind of operator."""
    sums: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for run in runs:
        of_run, number = defaultdict(float), defaultdict(int)
        for kind, ms in run:
            of_run[kind] += ms
            number[kind] += ms > 0
        for kind, ms in of_run.items():
            sums.setdefault(kind, []).append(ms)
            counts[kind] = number[kind]
    medians = {kind: statistics.median(found) for kind, found in sums.items()}
    whole = sum(medians.values())
    print(f"\n{title}: {whole:.2f} ms in operators, median of {len(runs)}")
    for kind, ms in sorted(medians.items(), key=lambda item: -item[1]):
        if ms >= LEAST * whole:
            print(f"  {kind:28} {counts[kind]:5} {ms:9.3f} ms {ms / whole:7.1%}")


if __name__ == "__main__":
    main()
