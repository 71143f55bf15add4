"""Where the milliseconds of a round go: whole rounds as `dovetail generate` makes them, split into both engines and the
host's parts; then one pass of the target and one call of the draft, operator by operator, by the engines' own counters.
Not a test: run it by hand.

Usage: python tests/tools/profile_round.py ARTIFACT [NODES] [CONTEXT]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from dovetail.export.demo.acceptance import held_out_prompts
from dovetail.runtime import load
from dovetail.runtime.decoding import engine, sequence
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.decoding.sequence import Sequence
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.drafts.joint_calls import JointCalls
from dovetail.runtime.drafts.model_draft import ModelDraft, ModelGrowth
from dovetail.runtime.drafts.onnxruntime_graph import OnnxRuntimeGraph
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.policies.base import DepthBudget
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import Step, read
from dovetail.runtime.targets.openvino import engine as target
from dovetail.runtime.targets.openvino.engine import OpenVinoSequence, OpenVinoTarget
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import CandidateTree, chain
from dovetail.runtime.trees.verified import Verified

REPEATS = 15
LEAST = 0.01  # of the whole, for a line of its own
NEW_TOKENS = 192
PARTS: list[tuple[str, Any, str]] = [
    ("lookup", LookupDraft, "grow"),
    ("lookup", LookupDraft, "tell"),
    ("the draft's tree", ModelDraft, "grow"),
    ("the draft's tree", ModelGrowth, "next_call"),
    ("the draft's tree", ModelGrowth, "take"),
    ("the draft's tree", ModelDraft, "tell"),
    ("the draft's feeds", OnnxRuntimeGraph, "run"),
    ("what is verified", engine, "draft_trees"),
    ("what is verified", RoundPlanner, "load"),
    ("what is verified", CandidateTree, "best"),
    ("room in the cache", OpenVinoSequence, "reserve"),
    ("accept", sequence, "accept"),
    ("commit", OpenVinoSequence, "commit"),
    ("what is learnt", Pace, "observe"),
    ("draw", Sampler, "draw"),
    ("foresee", Sampler, "foresee"),
    ("take", Sequence, "take"),
    ("emit", Stream, "_receive"),
]
"""Of the host: what a part calls of another part is that other's."""


def main() -> None:
    path = sys.argv[1]
    nodes, context = (int(word) for word in (*sys.argv[2:4], *("9", "256")[len(sys.argv[2:4]) :]))
    whole_rounds(path)
    operators(path, nodes, context)


def whole_rounds(path: str) -> None:
    """Mean rounds of one text, greedy and sampled."""
    with load(path, draft_device="cpu", trust=True) as pipe:
        host_s = host_clock(pipe)
        spent: dict[str, float] = {}
        inside = [0.0]  # of each part that is under way, and of the whole
        for part, owner, name in PARTS:
            setattr(owner, name, timed(getattr(owner, name), part, host_s, spent, inside))
        warm_up, prompt = held_out_prompts(2, 600)
        for temperature in (0.0, 1.0):
            settings = {"temperature": temperature, "seed": 1, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
            pipe.generate(warm_up, **settings)
            with pipe.stream(prompt, **settings) as stream:
                next(stream)  # comes with the prompt
                spent.clear()
                done = stream.finish()
            sums = done.totals
            host = {part: 1e3 * s for part, s in spent.items()}
            host["the rest of the host"] = sums.host_ms - sum(host.values())
            rows = {"the target's pass": sums.verify_ms, "the draft's engine": sums.draft_ms, **host}
            print(
                f"\nround at temperature {temperature:g}: {done.decode_ms / sums.rounds:.2f} ms, of these "
                f"{sums.host_ms / sums.rounds:.2f} the host's; mean of {sums.rounds} rounds, "
                f"accept length {sums.accept_length_mean:.2f}"
            )
            for part, ms in sorted(rows.items(), key=lambda row: -row[1]):
                print(f"  {part:28} {ms / sums.rounds:9.3f} ms {ms / done.decode_ms:7.1%}")


def host_clock(pipe: Pipeline) -> Callable[[], float]:
    """A clock that stands still in the target's passes and inside the draft's engine."""
    forward, passes_s = pipe.target.forward, [0.0]

    def counted(steps: Any) -> Any:
        start = time.perf_counter()
        try:
            return forward(steps)
        finally:
            passes_s[0] += time.perf_counter() - start

    pipe.target.forward = counted  # type: ignore[method-assign]  # a tool that looks inside
    draft = pipe.draft
    return lambda: time.perf_counter() - passes_s[0] - (draft.native_s if draft is not None else 0.0)


def timed(
    call: Callable[..., Any], part: str, host_s: Callable[[], float], spent: dict[str, float], inside: list[float]
) -> Callable[..., Any]:
    """`call`, its host time added to `spent[part]`, less that of the parts it calls."""

    def outer(*args: Any, **kwargs: Any) -> Any:
        inside.append(0.0)
        start = host_s()
        try:
            return call(*args, **kwargs)
        finally:
            took = host_s() - start
            spent[part] = spent.get(part, 0.0) + took - inside.pop()
            inside[-1] += took

    return outer


def operators(path: str, nodes: int, context: int) -> None:
    """Medians over passes and calls."""
    target._PRECISION["fast"]["PERF_COUNT"] = "YES"
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "draft"))
        ort.SessionOptions = lambda: options
        pipe = load(
            path, draft="artifact", draft_device="cpu", profile=None, trust=True, tree=TreeShape(nodes, nodes - 1, 1)
        )
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, pipe.target.info.vocab_size, context)
        assert isinstance(pipe.target, OpenVinoTarget)
        text = pipe.target.sequence()
        features = read(pipe.target, text, tokens).features
        passes = []
        for _ in range(REPEATS):
            pipe.target.forward([Step(text, chain(tokens[:nodes]))])
            passes.append(
                [(op.node_type, op.real_time.total_seconds() * 1e3) for op in pipe.target._request.get_profiling_info()]
            )
        show(f"target: a pass over {nodes} nodes behind {context} tokens", passes)
        assert isinstance(pipe.draft, OnnxRuntimeGraph)
        draft, calls, budget = ModelDraft(pipe.draft), JointCalls(pipe.draft), DepthBudget(1, 1)
        draft.tell(Verified(0, tokens, features[:-1]))
        calls.grow([draft.grow(int(tokens[-1]), budget)], 1)
        for _ in range(REPEATS):
            known = draft.known
            draft.tell(Verified(known, tokens[-2:], features[-1:]))
            calls.grow([draft.grow(int(tokens[-1]), budget)], 1)
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
