"""A text being made: rounds in, chunks out, until an end-of-sequence token, a stop string, the length, or a cancel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType

import numpy as np

from dovetail.runtime.decoding.conversation import Conversation
from dovetail.runtime.decoding.engine_lock import Turns
from dovetail.runtime.decoding.generation import Chunk, Generation, RoundTotals, RunSetup
from dovetail.runtime.decoding.rounds import Round, rounds
from dovetail.runtime.drafts.base import blind
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.text.stop_strings import StopScanner
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.trees.shape import MAX_TREE_NODES


class Stream:
    """Iterate it for its chunks; `finish` runs it to its end and gives the whole. `cancel` may come from any thread.

    It holds the engines from the first chunk on until it ends, is closed, or is dropped.
    """

    def __init__(
        self,
        conversation: Conversation,
        prompt: list[int],
        config: GenerationConfig,
        *,
        max_new_tokens: int,
        policy: Policy,
        sampler: Sampler,
        tokenizer: Tokenizer,
        turns: Turns,
        keep: bool,
        host: RunSetup,
    ) -> None:
        """`keep`: whether the conversation outlives the stream."""
        self._conversation, self._prompt, self._policy, self._sampler = conversation, prompt, policy, sampler
        self._foresight = sampler.foresee if config.temperature > 0 else blind
        self._max_new_tokens, self._turns, self._keep, self._host = max_new_tokens, turns, keep, host
        self._ends = frozenset[int]() if config.ignore_eos else config.eos_token_id
        self._seed = config.seed
        self._detokenizer = tokenizer.stream()
        self._stops = StopScanner(config.stop_strings, config.include_stop_str_in_output)
        self._rounds: Iterator[Round] | None = None  # while it is open
        self._cancelled = False
        self._reason: str | None = None
        self._text = ""
        self._token_ids: list[int] = []
        self._drafted: list[bool] = []
        self._totals = RoundTotals()
        self._prefill_ms = self._decode_ms = 0.0
        self._reused = 0
        draft = conversation.guard
        self._before = draft.bytes_in, draft.bytes_out, draft.rests  # of the conversation's earlier turns

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        if self._reason is not None:
            raise StopIteration
        start = time.perf_counter()
        try:
            if self._rounds is None:
                self._open()
                start = time.perf_counter()  # waiting for one's turn is not work
            self._turns.touch()
            assert self._rounds is not None
            done = next(self._rounds)
            chunk = self._take(done)
        except BaseException as error:
            self._close("cancelled" if isinstance(error, KeyboardInterrupt) else "error")
            raise
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        if done.nodes:
            self._decode_ms += elapsed_ms
            self._totals.add(done, host_ms=elapsed_ms - done.draft_ms - done.verify_ms)
        else:
            self._prefill_ms = elapsed_ms
        if chunk.finish_reason is not None:
            self._close(chunk.finish_reason)
        return chunk

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_rounds", None) is not None:
            self.close()

    def cancel(self) -> None:
        """Ask the stream to end after the round it is in. Safe from any thread and from signal handlers."""
        self._cancelled = True

    def close(self) -> None:
        """End here and let the next one in. `finish` then gives what was made so far, with reason `cancelled`."""
        self._close("cancelled")

    def finish(self) -> Generation:
        """Run to the end if it is not there yet; the whole generation."""
        for _ in self:
            pass
        draft = self._conversation.guard
        bytes_in, bytes_out, rests = self._before
        assert self._reason is not None
        return Generation(
            text=self._text,
            token_ids=self._token_ids,
            drafted=self._drafted,
            logprobs=self._sampler.logprobs[: len(self._token_ids)],
            finish_reason=self._reason,
            prompt_tokens=len(self._prompt),
            reused_tokens=self._reused,
            totals=self._totals,
            prefill_ms=self._prefill_ms,
            decode_ms=self._decode_ms,
            bytes_to_draft=draft.bytes_in - bytes_in,
            bytes_from_draft=draft.bytes_out - bytes_out,
            draft_failure=draft.failure,
            draft_rests=draft.rests - rests,
            seed=self._seed,
            host=self._host,
        )

    def _open(self) -> None:
        self._turns.begin()
        conversation = self._conversation
        try:
            assert not conversation.busy, "a conversation belongs to one pipeline, which has one stream at a time"
            self._reused = conversation.begin(self._prompt, self._max_new_tokens + MAX_TREE_NODES)
        except BaseException:
            self._turns.end()
            raise
        conversation.busy = True
        prompt = np.array(self._prompt[self._reused :], np.int64)
        self._rounds = rounds(
            conversation.target,
            conversation.draft,
            self._policy,
            self._sampler.draw,
            prompt,
            self._max_new_tokens,
            self._ends,
            self._foresight,
        )

    def _close(self, reason: str) -> None:
        self._reason = self._reason or reason
        if self._rounds is not None:
            self._rounds = None
            self._conversation.busy = False
            if not self._keep:
                self._conversation.close()
            self._turns.end()

    def _take(self, done: Round) -> Chunk:
        """Emit a round's tokens, up to the one that completes a stop string."""
        before = len(self._token_ids)
        pieces: list[str] = []
        reason = None
        for i, token in enumerate(done.tokens):
            self._token_ids.append(token)
            self._drafted.append(i < done.accept_length)
            ends = token in self._ends
            pieces.append("" if ends else self._stops.feed(self._detokenizer.push([token])))
            if ends or self._stops.found:
                reason = "stop"
                break
        if reason is None and len(self._token_ids) == self._max_new_tokens:
            reason = "length"
        if reason is None and self._cancelled:
            reason = "cancelled"
        if reason is not None:
            pieces[-1] += self._stops.feed(self._detokenizer.finish()) + self._stops.finish()
        tokens = self._token_ids[before:]
        self._conversation.extend(tokens)
        logprobs = self._sampler.logprobs[before : len(self._token_ids)]
        chunk = Chunk(pieces, tokens, self._drafted[before:], logprobs, reason)
        self._text += chunk.text
        return chunk
