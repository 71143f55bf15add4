"""Proves on a tiny artifact in the real engines that what fails, in a draft, a target or a reader, changes no other
token and leaves nothing behind; and that many generations leak neither pages, draft rows nor memory.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.tiny_pipeline import PROMPT, SAMPLED, assert_nothing_is_taken, open_tiny

from dovetail.runtime import load
from dovetail.runtime.decoding.feed import Request
from dovetail.runtime.drafts.graph_contract import Children, DraftCall
from dovetail.runtime.drafts.onnxruntime_graph import OnnxRuntimeGraph
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.errors import TargetError
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.targets.openvino.engine import OpenVinoTarget


class MineError(Exception):
    """The caller's own."""


def raise_over_a_stream(pipe: Pipeline) -> None:
    with pipe.conversation() as conversation:  # the stream has no block of its own
        for _ in pipe.stream(PROMPT, conversation=conversation, **SAMPLED):
            raise MineError


def raise_beside_a_stream(pipe: Pipeline) -> None:
    with pipe.conversation() as conversation:
        stream = pipe.stream(PROMPT, conversation=conversation, **SAMPLED)
        next(stream)
        raise MineError


def raise_over_many(pipe: Pipeline) -> None:
    for _ in pipe.generate_many([Request(PROMPT)] * 3):
        raise MineError


def raise_out_of_a_pipeline(artifact: Path) -> None:
    with open_tiny(artifact) as pipe:
        raise_beside_a_stream(pipe)


@pytest.mark.parametrize("work", [raise_over_a_stream, raise_beside_a_stream, raise_over_many])
def test_the_readers_own_error_comes_through_the_blocks_around_it(
    pipe: Pipeline, work: Callable[[Pipeline], None]
) -> None:
    with pytest.raises(MineError) as raised:
        work(pipe)
    del raised  # its traceback holds the stream
    assert pipe.target.free == pipe.target.capacity
    assert pipe.generate(PROMPT, **SAMPLED).finish_reason == "length"


def test_so_it_does_with_the_pipeline_that_ends(tiny_artifact: Path) -> None:
    with pytest.raises(MineError):
        raise_out_of_a_pipeline(tiny_artifact)


def test_a_consumer_that_stops_reading_frees_its_blocks(pipe: Pipeline) -> None:
    gc.disable()  # dropping the stream is enough
    try:
        read_one_chunk(pipe)
        pipe.engine.sweep()  # as every stream does that is opened, and every step
        assert_nothing_is_taken(pipe)
        assert pipe.generate(PROMPT, **SAMPLED).token_ids
    finally:
        gc.enable()


def read_one_chunk(pipe: Pipeline) -> None:
    for chunk in pipe.stream(PROMPT, **SAMPLED):
        assert chunk.token_ids
        break


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_draft_session_that_fails_in_the_middle_changes_no_token(
    tiny_artifact: Path, fault: str, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    pipe = open_tiny(tiny_artifact)
    expected = pipe.generate(PROMPT, **SAMPLED)
    assert pipe.draft is not None
    healthy, calls = OnnxRuntimeGraph.run, 0

    def failing(graph: OnnxRuntimeGraph, asked: Sequence[DraftCall]) -> list[Children]:
        nonlocal calls
        calls += 1
        out = healthy(graph, asked)
        if calls > 5 and fault == "raises":
            raise RuntimeError("device lost")
        if calls > 5:
            out[0].log_probs[:] = np.nan
        return out

    monkeypatch.setattr(OnnxRuntimeGraph, "run", failing)
    got = pipe.generate(PROMPT, **SAMPLED)
    assert got.token_ids == expected.token_ids
    assert got.draft_failure is not None
    assert sum(line.startswith("the draft failed") for line in told.messages) == 1
    assert expected.draft_failure is None


def test_nan_from_the_target_is_an_error_and_frees_the_blocks(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = open_tiny(tiny_artifact)
    forward, calls = OpenVinoTarget.forward, 0

    def failing(self: OpenVinoTarget, steps: Any, rows: int) -> Any:
        nonlocal calls
        calls += 1
        outputs = forward(self, steps, rows)
        if calls == 6:
            outputs[0].logits[:] = np.nan
        return outputs

    with monkeypatch.context() as patched:
        patched.setattr(OpenVinoTarget, "forward", failing)
        with pytest.raises(TargetError, match="expected finite logits"):
            pipe.generate(PROMPT, **SAMPLED)
    assert_nothing_is_taken(pipe)
    assert pipe.generate(PROMPT, **SAMPLED).finish_reason == "length"


def test_many_short_generations_leak_nothing(tiny_artifact: Path) -> None:
    """A generation leaves less than one Python object and less than a kilobyte behind, and one that does is noticed."""
    pipe = open_tiny(tiny_artifact, numerics="fast")
    page, kept = 4096, []

    def growth(count: int, keep: int) -> tuple[float, float]:
        """(blocks of Python's allocator, bytes of resident memory) a generation, over `count` that keep some bytes."""
        before = sys.getallocatedblocks(), resident_pages()
        for seed in range(count):
            pipe.generate([5, 9, 7], temperature=1.0, seed=seed, max_new_tokens=3, ignore_eos=True)
            if keep:
                kept.append(bytearray(keep))
        gc.collect()
        return (sys.getallocatedblocks() - before[0]) / count, (resident_pages() - before[1]) * page / count

    growth(500, keep=0)  # caches of all kinds fill
    blocks, size = (
        min(pair) for pair in zip(growth(400, keep=0), growth(400, keep=0), strict=True)
    )  # one may be noise
    planted_blocks, planted_size = growth(100, keep=200_000)
    print(f"a generation leaves {blocks:.3f} blocks and {size:.0f} bytes behind")
    assert blocks < 0.5 < planted_blocks
    assert size < 1000 < planted_size
    assert_nothing_is_taken(pipe)


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_matches_that_fail_end_no_text(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tiny_artifact, numerics="exact", draft="none", ctx_size=128) as pipe:
        expected = pipe.generate(["one", "two"], max_new_tokens=12, ignore_eos=True)

    def fail(*arguments: object) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(LookupDraft, "grow", fail)
    with load(tiny_artifact, numerics="exact", draft="lookup", ctx_size=128) as pipe:
        texts = pipe.generate(["one", "two"], max_new_tokens=12, ignore_eos=True)
    assert [text.token_ids for text in texts] == [text.token_ids for text in expected]
    assert {text.finish_reason for text in texts} == {"length"}
