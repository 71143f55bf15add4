"""Random traces for hypothesis: requests to one engine, and what happens while they are answered."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from fakes.pipeline import PLAIN
from hypothesis import strategies as st

from dovetail.runtime.decoding import round_planner
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.policies.chances import Chances
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.trees.shape import TreeShape

VOCAB = 12


@dataclasses.dataclass(frozen=True)
class Text:
    """One request of a trace."""

    prompt: tuple[int, ...]
    config: GenerationConfig
    policy: Policy = PLAIN
    draft: str = "none"  # none, graph, or one of the fakes; matches besides if it looks up
    looks_up: bool = False
    answers: int = 1
    arrival: int = 0  # steps before it
    fate: tuple[str, int] | None = None  # cancel, close or drop; steps behind its arrival
    fault: tuple[str, int] | None = None  # of its draft: where, and at which call
    follow_up: tuple[int, ...] | None = None  # a second turn of its conversation: what stands behind the first answer


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests, and what happens while they are answered."""

    texts: list[Text]
    capacity: int = 4096
    max_texts: int = 16
    graph_kind: str = "dgf"
    max_rows: int = 4096  # of the draft's graph
    prompt_tokens: int = round_planner.PROMPT_TOKENS
    prompt_tokens_beside: int = round_planner.PROMPT_TOKENS_BESIDE
    preemptions: frozenset[int] = frozenset()  # steps before which the newest text is preempted
    interrupts: frozenset[int] = frozenset()  # moments: see `Moments`
    graph_fault: int | None = None  # the call of the graph that raises
    free_drafts: bool = False  # by the prices drafting costs nothing


@st.composite
def configs(draw: st.DrawFn) -> GenerationConfig:
    most = draw(st.integers(1, 24))
    controls: dict[str, Any] = {"max_new_tokens": most, "seed": draw(st.integers(0, 1000))}
    controls |= draw(
        st.sampled_from(
            [
                {"temperature": 0.0},
                {"temperature": 0.0, "repetition_penalty": 1.3},
                {"temperature": 0.0, "no_repeat_ngram_size": 1},  # runs out of tokens: a draw that fails
                {"temperature": 1.0},
                {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
                {"temperature": 1.5, "top_k": 4, "no_repeat_ngram_size": 2},
            ]
        )
    )
    if draw(st.booleans()):
        controls["eos_token_id"] = [draw(st.integers(0, VOCAB - 1))]
        controls["min_new_tokens"] = draw(st.integers(0, most))
    if draw(st.booleans()):
        controls["stop_strings"] = [draw(st.sampled_from(["a", "bc", "dd", "hij", "kab"]))]
    return GenerationConfig(**controls)


CHANCES = Chances(tuple(round(0.95**i, 2) for i in range(1, 31)), ((0.5, 0.12, 0.03, 0.01),) * 6)  # short to print
SHAPES = st.sampled_from([TreeShape(1, 0, 1), TreeShape(4, 3, 1), TreeShape(8, 3, 3), TreeShape(24, 6, 4)])


@st.composite
def texts(draw: st.DrawFn) -> Text:
    config, shape = draw(configs()), draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    prompt = rng.integers(0, VOCAB, draw(st.integers(1, 40))).tolist()
    if draw(st.booleans()):
        prompt = (prompt * 3)[:40]  # so that there are matches
    draft = draw(st.sampled_from(["none", "graph", "graph", "graph", "good", "sometimes", "never"]))
    looks_up = draw(st.booleans())
    policy = Policy("lookup") if looks_up else PLAIN
    if draft != "none":
        policy = draw(
            st.sampled_from(
                [
                    Policy("fixed", shape, gain=2.0),
                    Policy("fixed", shape, gain=2.0, is_wish=True),
                    Policy("adaptive", shape, CHANCES, gain=2.0),
                ]
            )
        )
    kind = draw(st.integers(0, 9))
    fate = (draw(st.sampled_from(["cancel", "close", "drop"])), draw(st.integers(0, 12))) if kind == 0 else None
    faults = st.tuples(st.sampled_from(["tell", "grow", "next_call", "take", "nan"]), st.integers(1, 6))
    return Text(
        prompt=tuple(prompt),
        config=config,
        policy=policy,
        draft=draft,
        looks_up=looks_up,
        answers=draw(st.integers(2, 3)) if kind in (1, 2) and config.temperature else 1,
        arrival=draw(st.integers(0, 15)),
        fate=fate,
        fault=draw(faults) if kind in (3, 4) else None,
        follow_up=tuple(rng.integers(0, VOCAB, 3).tolist()) if kind == 5 else None,
    )


TRACES = st.builds(
    Trace,
    texts=st.lists(texts(), min_size=1, max_size=8),
    capacity=st.sampled_from([160, 200, 240, 4096]),
    max_texts=st.sampled_from([1, 4, 16]),
    graph_kind=st.sampled_from(["dgf", "dgf", "lm"]),
    max_rows=st.sampled_from([64, 256, 4096]),
    prompt_tokens=st.sampled_from([3, 7, 256]),
    prompt_tokens_beside=st.sampled_from([3, 5, 64]),
    preemptions=st.frozensets(st.integers(0, 30), max_size=5),
    interrupts=st.frozensets(st.integers(0, 600), max_size=12),
    graph_fault=st.one_of(st.none(), st.none(), st.none(), st.integers(1, 60)),
    free_drafts=st.booleans(),
)
