"""llama.cpp (llama-cpp-python) as a benchmark's child: plain, with a draft model, or with prompt lookup.

Two drafted tokens a round for prompt lookup is what its documentation advises on CPUs; a draft model drafts four: its
passes over several tokens cost nearly as much as one by one, so more does not pay.
"""

from __future__ import annotations

import time
from typing import Any

from dovetail.calibration.bench.peers.protocol import Answer, Loaded, Stopwatch, serve, versions
from dovetail.runtime.errors import UserError

_DRAFT_TOKENS, _LOOKUP_TOKENS, _NGRAM = 4, 2, 2


class LlamaCpp:
    """The high-level `Llama`, whose speculative loop calls a draft model for the next guess."""

    def __init__(
        self,
        *,
        gguf: str,
        weights: str,
        bytes_per_pass: int,
        threads: int,
        draft: str,
        ctx_size: int,
        assistant_gguf: str | None = None,
        **_: Any,
    ) -> None:
        start = time.perf_counter()
        try:
            import llama_cpp
        except ImportError:
            raise UserError("expected the package llama-cpp-python, got none; pip install 'dovetail[bench]'") from None
        imported = time.perf_counter()
        room = ctx_size + _DRAFT_TOKENS  # guesses may reach beyond the last token that is wanted
        common: dict[str, Any] = {"n_ctx": room, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        settings: dict[str, Any] = {"n_threads": threads, "n_ctx": room, "draft": draft}
        self._llama_cpp, self._drafter = llama_cpp, None
        if draft == "model":
            assert assistant_gguf is not None, "the parent has made it"
            self._drafter = _Drafter(llama_cpp, llama_cpp.Llama(assistant_gguf, **common))
            settings["drafted tokens"] = _DRAFT_TOKENS
        elif draft == "lookup":
            lookup = llama_cpp.llama_speculative.LlamaPromptLookupDecoding(_NGRAM, _LOOKUP_TOKENS)
            self._drafter = _Drafter(llama_cpp, lookup)
            settings |= {"num_pred_tokens": _LOOKUP_TOKENS, "max_ngram_size": _NGRAM}
        # logits_all is implied by a draft, but only said aloud does it make room for the logits of long prompts
        self._llama = _timed_llama(llama_cpp)(
            gguf, draft_model=self._drafter, logits_all=self._drafter is not None, **common
        )
        self.loaded = Loaded(
            imported - start,
            time.perf_counter() - imported,
            {**versions("llama-cpp-python"), "features": llama_cpp.llama_print_system_info().decode().strip()},
            settings,
            weights,
            bytes_per_pass,
        )

    def run(self, ids: list[int], max_new_tokens: int, temperature: float, seed: int, margins: bool = False) -> Answer:
        """See `Peer`."""
        assert not margins, "only our own runner tells margins"
        llama, drafter = self._llama, self._drafter
        llama.reset()  # else a prompt that is still in the cache would not be read
        llama.set_seed(seed)
        llama.eval_s = 0.0
        if drafter is not None:
            drafter.begin()
        watch, calls, prompt_s = Stopwatch(), -1, 0.0
        for token in llama.generate(ids, top_k=0, top_p=1.0, min_p=0.0, temp=temperature, repeat_penalty=1.0):
            if drafter is None:
                watch.delivered([token])
            else:
                watch.delivered([token], same_round=drafter.calls == calls)
                calls = drafter.calls
            if len(watch.token_ids) == 1:
                prompt_s = llama.eval_s
            if len(watch.token_ids) == max_new_tokens:
                break
        answer = watch.answer()
        answer.verify_ms = 1e3 * (llama.eval_s - prompt_s)
        answer.draft_ms = 0.0 if drafter is None else 1e3 * drafter.seconds
        answer.timed_ms, answer.num_timed_rounds = answer.rounds[-1][0] - answer.rounds[0][0], len(answer.rounds) - 1
        return answer


class _Drafter:
    """Stands where llama-cpp-python expects a `LlamaDraftModel`: counts and times the guesses of what it wraps, a small
    `Llama` that drafts greedily or a prompt lookup.
    """

    def __init__(self, llama_cpp: Any, inner: Any) -> None:
        self._inner, self._is_model = inner, isinstance(inner, llama_cpp.Llama)
        self.calls, self.seconds = 0, 0.0

    def begin(self) -> None:
        """Another text begins."""
        self.calls, self.seconds = 0, 0.0
        if self._is_model:
            self._inner.reset()

    def __call__(self, input_ids: Any, /, **_: Any) -> Any:
        import numpy as np

        start = time.perf_counter()
        self.calls += 1
        if self._is_model:
            guesses = []
            # Greedy; its cache keeps the longest common beginning, so only what is new is read.
            for token in self._inner.generate(input_ids.tolist(), temp=0.0, top_k=1, repeat_penalty=1.0):
                guesses.append(token)
                if len(guesses) == _DRAFT_TOKENS:
                    break
            drafted = np.array(guesses, np.intc)
        else:
            drafted = self._inner(input_ids)
        self.seconds += time.perf_counter() - start
        return drafted


def _timed_llama(llama_cpp: Any) -> Any:
    class TimedLlama(llama_cpp.Llama):  # type: ignore[misc]  # the base comes with the package
        eval_s = 0.0

        def eval(self, tokens: list[int]) -> None:
            start = time.perf_counter()
            super().eval(tokens)
            self.eval_s += time.perf_counter() - start

    return TimedLlama


if __name__ == "__main__":
    serve(LlamaCpp)
