"""Dovetail itself as a benchmark's child, with or without a draft."""

from __future__ import annotations

import time
from typing import Any

from dovetail.calibration.bench.peers.protocol import Answer, Loaded, Stopwatch, serve, versions
from dovetail.calibration.bench.weights import target_bytes_per_pass


class Ours:
    """The public pipeline."""

    def __init__(self, *, artifact: str, **settings: Any) -> None:
        """`settings` are those of `EngineConfig`."""
        start = time.perf_counter()
        import onnxruntime  # noqa: F401  # load() imports both where it needs them, which would count as loading
        import openvino  # noqa: F401

        from dovetail.runtime.pipeline import load

        imported = time.perf_counter()
        if settings["draft"] not in ("auto", "artifact"):
            settings["draft_device"] = "auto"  # there is no draft to put on the one that was asked for
        self._pipe = load(artifact, trust=True, **settings)  # the parent has verified every hash
        loaded = time.perf_counter()
        manifest = self._pipe.artifact.manifest
        tree = None if settings["draft"] == "none" else "default"
        if self._pipe.profile is not None:
            tree = "calibrated, " + "; ".join(choice.summary for choice in self._pipe.profile.choices)
        shown = {
            "threads": self._pipe.threads,
            "numerics": self._pipe.target.numerics,
            "draft": settings["draft"],
            "draft_device": self._pipe.draft_device,
            "tree": tree,
        }
        self.loaded = Loaded(
            imported - start,
            loaded - imported,
            versions("dovetail", "openvino", "onnxruntime-gpu", "numpy"),
            shown,
            f"artifact, {manifest.target.weight_format}",
            target_bytes_per_pass(self._pipe.artifact),
        )

    def run(self, ids: list[int], max_new_tokens: int, temperature: float, seed: int, margins: bool = False) -> Answer:
        """See `Peer`. The first delivery is the token that comes with the prompt; the draft reads it behind that."""
        watch = Stopwatch()
        from dovetail.runtime.sampling.config import GenerationConfig

        stream = self._pipe.stream(
            ids,
            GenerationConfig(  # not the artifact's own defaults: every peer draws from the same plain distribution
                temperature=temperature,
                seed=seed,
                max_new_tokens=max_new_tokens,
                ignore_eos=True,
                logprobs=2 if margins else None,
            ),
        )
        for chunk in stream:
            watch.delivered(chunk.token_ids)
        generation, answer = stream.finish(), watch.answer()
        answer.draft_ms, answer.verify_ms = generation.totals.draft_ms, generation.totals.verify_ms
        answer.timed_ms, answer.num_timed_rounds = generation.decode_ms, generation.totals.rounds
        if margins:
            answer.margins = [_margin(entry.top) for entry in generation.logprobs]
        return answer


def _margin(best: list[tuple[int, float]]) -> float:
    """How far the best token's logit is above the next one's: log-probabilities differ by the same."""
    return best[0][1] - best[1][1]


if __name__ == "__main__":
    serve(Ours)
