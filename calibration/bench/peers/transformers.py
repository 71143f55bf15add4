"""transformers as a benchmark's child: plain, or assisted by a small model. The one file outside export/ that imports
torch: what it measures is an engine users would pick instead, in a process of its own.
"""

from __future__ import annotations

import time
from typing import Any

from dovetail.calibration.bench.peers.protocol import Answer, Loaded, Stopwatch, serve, versions
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.cpu import computes_bfloat16


class Transformers:
    """`generate` with the dynamic cache and scaled-dot-product attention; for the assistant transformers' own defaults:
    up to 20 drafted tokens, ended early where the assistant's confidence falls below 0.4.
    """

    def __init__(self, *, checkpoint: str, threads: int, draft: str, assistant: str | None = None, **_: Any) -> None:
        start = time.perf_counter()
        try:
            import torch
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging
        except ImportError:
            raise UserError("expected torch and transformers, got none; pip install 'dovetail[convert]'") from None
        imported = time.perf_counter()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        dtype = torch.bfloat16 if computes_bfloat16() else torch.float32

        def load(folder: str) -> Any:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            model.generation_config.eos_token_id = None  # go on behind the end of the text, as all runners do
            return model.eval()

        self._model = load(checkpoint)
        self._assistant = load(assistant) if draft == "model" and assistant is not None else None
        self._verify, self._draft = _Timed(self._model), None if self._assistant is None else _Timed(self._assistant)
        name = str(dtype).removeprefix("torch.")
        embedding, head = self._model.get_input_embeddings().weight, self._model.get_output_embeddings().weight
        looked_up = 0 if embedding is head else embedding.nbytes
        settings: dict[str, Any] = {"threads": threads, "dtype": name, "attention": "sdpa", "draft": draft}
        if self._assistant is not None:
            settings |= {"num_assistant_tokens": 20, "schedule": "constant", "assistant_confidence_threshold": 0.4}
        self.loaded = Loaded(
            imported - start,
            time.perf_counter() - imported,
            versions("transformers", "torch"),
            settings,
            f"checkpoint, {name}",
            sum(parameter.nbytes for parameter in self._model.parameters()) - looked_up,
        )

    def run(self, ids: list[int], max_new_tokens: int, temperature: float, seed: int, margins: bool = False) -> Answer:
        """See `Peer`."""
        assert not margins, "only our own runner tells margins"
        torch = self._torch
        controls: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            torch.manual_seed(seed)
            controls = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        watch = Stopwatch()
        streamer = _Streamer(watch, self._verify, self._draft)
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                assistant_model=self._assistant,
                streamer=streamer,
                pad_token_id=0,
                **controls,
            )
        answer = watch.answer()
        answer.verify_ms = self._verify.ms
        answer.draft_ms = 0.0 if self._draft is None else self._draft.ms
        answer.timed_ms, answer.num_timed_rounds = answer.rounds[-1][0] - answer.rounds[0][0], len(answer.rounds) - 1
        return answer


class _Streamer:
    """What `generate` hands tokens to: first the prompt, then each round's. Behind the first round the clocks of the
    two models start anew, so that they tell of decoding only.
    """

    def __init__(self, watch: Stopwatch, *clocks: _Timed | None) -> None:
        self._watch, self._clocks, self._seen_prompt = watch, clocks, False

    def put(self, tokens: Any) -> None:
        if self._seen_prompt:
            self._watch.delivered(tokens.reshape(-1).tolist())
            if len(self._watch.rounds) == 1:
                for clock in filter(None, self._clocks):
                    clock.ms = 0.0
        self._seen_prompt = True

    def end(self) -> None:
        pass


class _Timed:
    """The milliseconds spent in a model's forward passes."""

    def __init__(self, model: Any) -> None:
        self.ms, self._started = 0.0, 0.0
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def _before(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _after(self, *_: Any) -> None:
        self.ms += 1e3 * (time.perf_counter() - self._started)


if __name__ == "__main__":
    serve(Transformers)
