"""A text being made: rounds in, chunks out, until an end-of-sequence token, a stop string, the length, or a cancel."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType

import numpy as np
from dovetail.runtime.conversation import Conversation
from dovetail.runtime.draft import NoDraft
from dovetail.runtime.engine import Round, rounds
from dovetail.runtime.generation import Chunk, Generation, RoundTotals
from dovetail.runtime.generation_config import GenerationConfig
from dovetail.runtime.guard import GuardedDraft
from dovetail.runtime.manifest import TargetInfo
from dovetail.runtime.policy import Policy
from dovetail.runtime.sampling import Sampler
from dovetail.runtime.stop import StopScanner
from dovetail.runtime.text import Tokenizer


class Stream:
    """Iterate it for its chunks; `finish` runs it to its end and gives the whole. `cancel` may come from any thread."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: Tokenizer,
        policy: Policy,
        config: GenerationConfig,
        prompt: list[int],
        *,
        max_new_tokens: int,
        sequence: int,
        info: TargetInfo,
        warn: Callable[[str], None],
        begin: Callable[[], None],
        end: Callable[[], None],
        describe: dict[str, str | int],
    ) -> None:
        """`begin` and `end` are called around the work. `describe` holds the fields of `Generation` that are the
        pipeline's to know.
        """
        self._conversation, self._policy, self._config, self._prompt = conversation, policy, config, prompt
        self._max_new_tokens = max_new_tokens
        self._eos = frozenset[int]() if config.ignore_eos else config.eos_token_ids
        self._sampler = Sampler(config, prompt, info.vocab_size, sequence)
        self._draft = GuardedDraft(conversation.draft or NoDraft(), warn)
        self._detokenizer = tokenizer.stream()
        self._stops = StopScanner(config.stop_strings, config.include_stop_str_in_output)
        self._begin, self._end, self._describe = begin, end, describe
        self._cancelled = False
        self._reason: str | None = None
        self._text = ""
        self._token_ids: list[int] = []
        self._drafted: list[bool] = []
        self._totals = RoundTotals()
        self._prefill_ms = self._decode_ms = 0.0
        self._reused = 0
        self._bytes_before = self._draft.bytes_in, self._draft.bytes_out  # of the conversation's earlier turns
        self._chunks = self._run()

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """Ask the stream to end after the round it is in. Safe from any thread and from signal handlers."""
        self._cancelled = True

    def close(self) -> None:
        """Stop here and free the cache, unless a conversation keeps it. `finish` then gives what was made so far."""
        self._chunks.close()

    def finish(self) -> Generation:
        """Run to the end if it is not there yet; the whole generation."""
        for _ in self._chunks:
            pass
        return Generation(
            text=self._text,
            token_ids=self._token_ids,
            drafted=self._drafted,
            logprobs=self._sampler.logprobs[: len(self._token_ids)],
            finish_reason=self._reason or "cancelled",
            prompt_tokens=len(self._prompt),
            reused_tokens=self._reused,
            totals=self._totals,
            prefill_ms=self._prefill_ms,
            decode_ms=self._decode_ms,
            bytes_to_draft=self._draft.bytes_in - self._bytes_before[0],
            bytes_from_draft=self._draft.bytes_out - self._bytes_before[1],
            draft_failure=self._draft.failure,
            draft_rests=self._draft.rests,
            seed=self._config.seed,
            **self._describe,  # type: ignore[arg-type]  # devices, numerics, threads
        )

    def _run(self) -> Generator[Chunk, None, None]:
        self._begin()
        try:
            start = time.perf_counter()
            self._reused = self._conversation.rewind(self._prompt)
            prompt = np.array(self._prompt[self._reused :], np.int64)
            loop = rounds(
                self._conversation.target, self._draft, self._policy, self._sampler, prompt, self._max_new_tokens
            )
            while self._reason is None:
                done = next(loop)
                chunk = self._take(done)
                elapsed_ms = 1e3 * (time.perf_counter() - start)
                if len(self._token_ids) == len(chunk.token_ids):  # the first round: what came before it was the prefill
                    self._prefill_ms = elapsed_ms - done.draft_ms - done.verify_ms - done.host_ms
                    elapsed_ms -= self._prefill_ms
                self._decode_ms += elapsed_ms
                yield chunk
                start = time.perf_counter()
        finally:
            self._end()

    def _take(self, done: Round) -> Chunk:
        """Emit a round's tokens, up to the first that ends the text."""
        before = len(self._token_ids)
        pieces: list[str] = []
        for i, token in enumerate(done.tokens):
            self._token_ids.append(token)
            self._drafted.append(i < done.accept_length)
            ends = token in self._eos
            pieces.append("" if ends else self._stops.feed(self._detokenizer.push([token])))
            if ends or self._stops.found:
                self._reason = "stop"
                break
        self._totals.add(done)
        if self._reason is None and len(self._token_ids) == self._max_new_tokens:
            self._reason = "length"
        if self._reason is None and self._cancelled:
            self._reason = "cancelled"
        if self._reason is not None:
            pieces[-1] += self._stops.feed(self._detokenizer.finish()) + self._stops.finish()
        tokens = self._token_ids[before:]
        logprobs = self._sampler.logprobs[before : len(self._token_ids)]
        chunk = Chunk(pieces, tokens, self._drafted[before:], logprobs, self._reason)
        self._text += chunk.text
        self._conversation.extend(tokens)
        return chunk
