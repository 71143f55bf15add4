"""OpenVINO GenAI as a benchmark's child: plain, with a draft model, or with prompt lookup, on the artifact's own IR.

Settings are those of its own samples: five drafted tokens a round; for prompt lookup n-grams of up to three.
"""

from __future__ import annotations

import time
from typing import Any

from dovetail.calibration.bench.peers.protocol import Answer, Loaded, Stopwatch, serve, versions
from dovetail.calibration.bench.weights import target_bytes_per_pass
from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import UserError

ASSISTANT_TOKENS, NGRAM = 5, 3


class GenAI:
    """`LLMPipeline`, whose CPU backend is continuous batching with paged attention."""

    def __init__(self, *, artifact: str, threads: int, draft: str, assistant_ir: str | None = None, **_: Any) -> None:
        start = time.perf_counter()
        try:
            import openvino_genai
        except ImportError:
            raise UserError("expected the package openvino-genai, got none; pip install 'dovetail[bench]'") from None
        imported = time.perf_counter()
        opened = open_artifact(artifact, trust=True)  # the parent has verified every hash
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # every prompt is read, as by the other runners
        options: dict[str, Any] = {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": threads}
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "enable_prefix_caching": False, "draft": draft}
        if draft == "model":
            assert assistant_ir is not None, "the parent has made it"
            options["draft_model"] = openvino_genai.draft_model(assistant_ir, "CPU", INFERENCE_NUM_THREADS=threads)
            settings["num_assistant_tokens"] = ASSISTANT_TOKENS
        elif draft == "lookup":
            options["prompt_lookup"] = True
            settings |= {"num_assistant_tokens": ASSISTANT_TOKENS, "max_ngram_size": NGRAM}
        self._genai, self._draft = openvino_genai, draft
        self._pipe = openvino_genai.LLMPipeline(str((opened.path / TARGET_MODEL).parent), "CPU", **options)
        self.loaded = Loaded(
            imported - start,
            time.perf_counter() - imported,
            versions("openvino-genai", "openvino"),
            settings,
            f"artifact, {opened.manifest.target.weight_format}",
            target_bytes_per_pass(opened),
        )

    def run(self, ids: list[int], max_new_tokens: int, temperature: float, seed: int, margins: bool = False) -> Answer:
        """See `Peer`."""
        import numpy as np
        import openvino as ov

        assert not margins, "only our own runner tells margins"
        config = self._genai.GenerationConfig(max_new_tokens=max_new_tokens, ignore_eos=True)
        config.do_sample = temperature > 0
        if temperature > 0:
            config.temperature, config.top_k, config.top_p, config.rng_seed = temperature, 0, 1.0, seed
        if self._draft != "none":
            config.num_assistant_tokens = ASSISTANT_TOKENS
        if self._draft == "lookup":
            config.max_ngram_size = NGRAM
        prompt = np.array([ids], np.int64)  # [1, n]
        inputs = self._genai.TokenizedInputs(ov.Tensor(prompt), ov.Tensor(np.ones_like(prompt)))
        watch = Stopwatch()
        result = self._pipe.generate(inputs, config, _streamer(self._genai, watch))
        answer = watch.answer()
        answer.token_ids = [int(token) for token in result.tokens[0]]
        _split(result, answer)
        return answer


def _streamer(genai: Any, watch: Stopwatch) -> Any:
    class Streamer(genai.StreamerBase):  # type: ignore[misc]  # the base comes with the package
        def write(self, tokens: int | list[int]) -> Any:
            watch.delivered(tokens if isinstance(tokens, list) else [tokens])
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Streamer()


def _split(result: Any, answer: Answer) -> None:
    """Take the two models' own times per call, where a draft model ran. The target's first call read the prompt before
    the first token; the draft read it after.
    """
    metrics = result.extended_perf_metrics
    if metrics is None:
        return
    main, draft = (
        [float(us) / 1e3 for us in model.raw_metrics.m_durations]
        for model in (metrics.main_model_metrics, metrics.draft_model_metrics)
    )
    answer.verify_ms, answer.draft_ms = sum(main[1:]), sum(draft)
    answer.timed_ms, answer.num_timed_rounds = answer.rounds[-1][0] - answer.rounds[0][0], len(main) - 1


if __name__ == "__main__":
    serve(GenAI)
