"""OpenVINO GenAI as a writer of the table of losslessness: `ContinuousBatchingPipeline` on the artifact's own IR."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from dovetail.calibration.bench import lossless
from dovetail.calibration.bench.lossless import Text, Written, few_pages
from dovetail.calibration.bench.peers.genai import ASSISTANT_TOKENS, NGRAM
from dovetail.calibration.bench.peers.protocol import Loaded, serve, versions
from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import UserError

_PRECISION = {
    "fast": {},  # as it comes
    "exact": {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    },
}
_WHOLE, _BUDGET, _PAGE, _CACHE_GB = 4096, 256, 32, 1  # tokens of a pass; 256 is its own default


class GenAIWriter:
    """One draft. A pipeline for every way to schedule is made when that is asked for."""

    def __init__(
        self, *, artifact: str, threads: int, numerics: str, draft: str, assistant_ir: str | None = None, **_: Any
    ) -> None:
        """`assistant_ir`: the model of the draft "model"; without one the target drafts for itself."""
        start = time.perf_counter()
        try:
            import openvino_genai
        except ImportError:
            raise UserError("expected the package openvino-genai, got none; pip install 'dovetail[bench]'") from None
        opened = open_artifact(artifact, trust=True)  # the parent has verified every hash
        self._genai, self._draft = openvino_genai, draft
        self._folder = str((opened.path / TARGET_MODEL).parent)
        self._assistant = assistant_ir or self._folder
        self._settings = {"INFERENCE_NUM_THREADS": threads, **_PRECISION[numerics]}
        self._pipe: Any = None
        self._scheduler: dict[str, Any] = {}
        self.loaded = Loaded(
            time.perf_counter() - start, 0.0, versions("openvino-genai", "openvino"), self._settings, "artifact", None
        )

    def run(self, way: str, texts: list[dict[str, Any]], controls: dict[str, Any], tokens: int, seed: int) -> Written:
        """See `Writer`; what the library raises is an error of the texts that it was making."""
        if "logit_bias" in controls:
            raise UserError("OpenVINO GenAI has no logit bias")
        asked = [Text(**text) for text in texts]
        written = Written([])
        config = self._config(controls, tokens, seed)
        questions = [[text.question] for text in asked]
        if way == lossless.ALONE:
            written.texts = self._each({}, questions, config, written)
        elif way == lossless.LONG_ALONE:
            written.texts = self._each({}, [[text.long] for text in asked], config, written)
        elif way == lossless.CHUNKS:
            scheduler = {"max_num_batched_tokens": _BUDGET}
            written.texts = self._each(scheduler, [[text.question, text.long] for text in asked], config, written)
        elif way in (lossless.TOGETHER_WAY, lossless.PREEMPTED):
            scheduler = {"max_num_seqs": lossless.TOGETHER, "max_num_batched_tokens": _BUDGET}
            if way == lossless.PREEMPTED:
                scheduler |= {"num_kv_blocks": few_pages(asked, tokens, _PAGE)}
            made = self._made(scheduler, [text.question for text in asked], config, written)
            written.texts = made or [None] * len(asked)
        else:
            scheduler = {"enable_prefix_caching": True} if way == lossless.CACHED else {}
            first = self._each(scheduler, questions, config, written)
            again = [[[*text.question, *(one or []), *text.follow_up]] for text, one in zip(asked, first, strict=True)]
            second = self._each(scheduler, again, config, written)
            turns = zip(first, second, strict=True)
            written.texts = [None if None in both else list(both) for both in turns]
        return written

    def _config(self, controls: dict[str, Any], tokens: int, seed: int) -> Any:
        config = self._genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
        temperature = controls.get("temperature", 0.0)
        config.do_sample = temperature > 0
        if temperature > 0:
            config.temperature, config.top_k, config.top_p, config.rng_seed = temperature, 0, 1.0, seed
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            if name in controls:
                setattr(config, name, controls[name])
        config.stop_strings = set(controls.get("stop_strings", ()))
        if self._draft != "none":
            config.num_assistant_tokens = ASSISTANT_TOKENS
        if self._draft == "lookup":
            config.max_ngram_size = NGRAM
        return config

    def _each(
        self, scheduler: dict[str, Any], groups: Sequence[list[list[int]]], config: Any, written: Written
    ) -> list[list[int] | None]:
        """One group after the other; the answer to the last prompt of each."""
        made = [self._made(scheduler, prompts, config, written) for prompts in groups]
        return [None if answers is None else answers[-1] for answers in made]

    def _made(
        self, scheduler: dict[str, Any], prompts: list[list[int]], config: Any, written: Written
    ) -> list[list[int]] | None:
        """The answers to `prompts`, made together."""
        import numpy as np
        import openvino as ov

        if self._pipe is None or scheduler != self._scheduler:
            self._pipe = None  # two of them need twice the memory
            self._pipe, self._scheduler = self._pipeline(scheduler), scheduler
        inputs = [ov.Tensor(np.array([ids], np.int64)) for ids in prompts]  # [1, n] each
        try:
            results = self._pipe.generate(inputs, [config] * len(inputs))
        except RuntimeError as error:
            self._pipe = None  # what it holds is not known
            written.errors.append(re.split(r" at /\S", str(error).strip().splitlines()[-1])[0][:200])
            return None
        return [[int(token) for token in result.m_generation_ids[0]] for result in results]

    def _pipeline(self, changes: dict[str, Any]) -> Any:
        scheduler = self._genai.SchedulerConfig()
        settings = {"max_num_batched_tokens": _WHOLE, "enable_prefix_caching": False, **changes}
        if "num_kv_blocks" not in settings:
            settings["cache_size"] = _CACHE_GB
        for name, value in settings.items():
            setattr(scheduler, name, value)
        properties: dict[str, Any] = dict(self._settings)
        if self._draft == "model":
            properties["draft_model"] = self._genai.draft_model(self._assistant, "CPU", **self._settings)
        elif self._draft == "lookup":
            properties["prompt_lookup"] = True
        return self._genai.ContinuousBatchingPipeline(self._folder, scheduler, "CPU", properties)


if __name__ == "__main__":
    serve(GenAIWriter)
