"""One answer as its reader sees it: chunks of text, up to an end-of-sequence token, a stop string, the length, or a
cancel.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from types import TracebackType

from dovetail.runtime.decoding.conversation import Conversation
from dovetail.runtime.decoding.engine import Engine, Update
from dovetail.runtime.decoding.generation import Chunk, Generation, RoundTotals, RunSetup
from dovetail.runtime.decoding.sequence import Sequence
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.text.stop_strings import StopScanner
from dovetail.runtime.text.tokenizer import Tokenizer


class Stream:
    """Iterate it for its chunks, with `for` or `async for`; `finish` runs it to its end and gives the whole. `cancel`
    may come from any thread.

    Any number of streams may be open, in one thread or in several: whoever waits for a chunk moves all of them on, and
    what comes for another one waits there for its reader. A stream that is dropped ends.
    """

    def __init__(
        self,
        engine: Engine,
        sequence: Sequence,
        config: GenerationConfig,
        *,
        conversation: Conversation,
        keeps_conversation: bool,
        sampler: Sampler,
        tokenizer: Tokenizer,
        setup: RunSetup,
    ) -> None:
        """`sequence` makes its text in the cache of `conversation`; `keeps_conversation`: whether that outlives it."""
        self._engine, self._sequence, self._sampler = engine, sequence, sampler
        self._conversation, self._keeps_conversation, self._setup = conversation, keeps_conversation, setup
        self._ends = frozenset[int]() if config.ignore_eos else config.eos_token_id
        self._seed = config.seed
        self._tokenizer = tokenizer
        self._shows_special = not config.skip_special_tokens
        self._detokenizer = tokenizer.stream(config.skip_special_tokens, sequence.text)
        self._stops = StopScanner(config.stop_strings, config.include_stop_str_in_output)
        self._is_open = False
        self._inbox: deque[Chunk] = deque()
        self._error: BaseException | None = None
        self._reason: str | None = None
        self._text = ""
        self._token_ids: list[int] = []
        self._drafted: list[bool] = []
        self._totals = RoundTotals()
        self._prefill_ms = self._decode_ms = 0.0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        while True:
            is_over = self._reason is not None  # asked first: another thread may be about to bring the last chunk
            if self._inbox:
                return self._inbox.popleft()
            if is_over and self._error is not None:
                error, self._error = self._error, None
                raise error
            if is_over:
                raise StopIteration
            try:
                with self._engine.lock:
                    self.open()
                    if not self._inbox and self._reason is None:
                        self._engine.step()
            except KeyboardInterrupt:
                self.close()
                raise
            except BaseException:
                self._end("error")
                raise

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk; the rounds run in a thread, so that the event loop goes on."""
        chunk = await asyncio.to_thread(next, self, None)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # It may run in the middle of a step, of this very thread: the next step frees what the text holds.
        if getattr(self, "_is_open", False):
            self._sequence.is_cancelled = True

    @property
    def finish_reason(self) -> str | None:
        """Why it has ended; None while it goes on. Its last chunks may still wait to be read."""
        return self._reason

    def open(self) -> None:
        """Join the texts that wait for their first step, if it has not yet. Raises `UserError`."""
        if self._is_open or self._reason is not None:
            return
        with self._engine.lock:
            self._engine.check_open()
            self._engine.sweep()
            self._sequence.reused = self._conversation.begin(self._sequence)
            self._sequence.drawn_before = self._conversation.drawn
            self._is_open = True
            ending = _Ending(self._conversation, self._sequence, self._keeps_conversation)
            self._engine.add(self._sequence, self._receive, ending)

    def share_prompt(self, others: list[Stream]) -> None:
        """Open `others`, which answer the same prompt, when this one has read it; they go on from its cache."""
        with self._engine.lock:
            for stream in (self, *others):
                stream.open()
            self._sequence.siblings = [stream._sequence for stream in others]

    def cancel(self) -> None:
        """Ask the stream to end before the next pass, and now if nobody else waits for the one that runs. Safe from any
        thread and from signal handlers.
        """
        self._engine.cancel(self._sequence)

    def close(self) -> None:
        """End here. `finish` then gives what was made so far, with reason `cancelled`."""
        self._end("cancelled")
        self._inbox.clear()
        self.cancel()
        if self._is_open and self._engine.lock.acquire(blocking=False):
            try:
                self._engine.sweep()
            finally:
                self._engine.lock.release()

    def finish(self) -> Generation:
        """Run to the end if it is not there yet; the whole generation."""
        for _ in self:
            pass
        assert self._reason is not None
        model = self._conversation.cache.model
        return Generation(
            text=self._text,
            token_ids=self._token_ids,
            drafted=self._drafted,
            logprobs=self._sampler.logprobs[: len(self._token_ids)],
            finish_reason=self._reason,
            prompt_tokens=self._sequence.prompt_length,
            reused_tokens=self._sequence.reused,
            totals=self._totals,
            prefill_ms=self._prefill_ms,
            decode_ms=self._decode_ms,
            draft_failure=None if model is None else model.failure,
            draft_rests=self._sequence.pace.rests,
            preemptions=self._sequence.preemptions,
            seed=self._seed,
            setup=self._setup,
        )

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason

    def _receive(self, update: Update) -> None:
        """What a step brought; called by whoever makes the step."""
        if self._reason is not None:  # closed meanwhile
            update.sequence.end("cancelled")
            return
        start = time.perf_counter()
        sequence = update.sequence
        if update.tokens:
            try:
                self._inbox.append(self._take(update))
            except Exception as error:
                sequence.finish_reason, sequence.error = "error", error
            except BaseException:  # an interrupt in the middle of a chunk, which is lost
                self._end("cancelled")
                self.cancel()
                raise
        if sequence.finish_reason == "cancelled" and not update.tokens:
            # The pieces that were held back are let out with the last chunk.
            self._inbox.append(Chunk([self._flush()], [], [], [], "cancelled"))
            self._text += self._inbox[-1].text
        if sequence.error is not None:
            self._error = sequence.error
        if sequence.finish_reason is not None:
            self._reason = sequence.finish_reason
        if update.cost is not None:
            own_ms = 1e3 * (time.perf_counter() - start)
            if update.nodes:
                self._decode_ms += update.cost.total_ms + own_ms
                self._totals.add(update, own_ms)
            else:
                self._prefill_ms += update.cost.total_ms + own_ms

    def _take(self, update: Update) -> Chunk:
        """Emit a round's tokens, up to the one that completes a stop string."""
        before = len(self._token_ids)
        pieces: list[str] = []
        for i, token in enumerate(update.tokens):
            self._token_ids.append(token)
            self._drafted.append(i < update.accept_length)
            ends = token in self._ends
            pieces.append(self._let_out(token, ends))
            if ends or self._stops.found:
                update.sequence.end("stop")
                break
        if self._stops.found:
            update.sequence.finish_reason = "stop"  # and not by the length that the round reached behind it
            update.sequence.keep(len(self._token_ids))
        reason = update.sequence.finish_reason
        if reason is not None:
            pieces[-1] += self._flush()
        logprobs = self._sampler.logprobs[before : len(self._token_ids)]
        chunk = Chunk(pieces, self._token_ids[before:], self._drafted[before:], logprobs, reason)
        self._text += chunk.text
        return chunk

    def _let_out(self, token: int, ends: bool) -> str:
        """The text that can be shown now that `token` has come. A special token is seen by the stop strings even where
        it is not shown; what `ends` the answer is shown with the special tokens only."""
        if self._shows_special:
            return self._stops.feed(self._detokenizer.push([token]))
        if ends:
            return ""
        return self._stops.feed(self._detokenizer.push([token]), self._tokenizer.skipped_text(token))

    def _flush(self) -> str:
        return self._stops.feed(self._detokenizer.finish()) + self._stops.finish()


class _Ending:
    """What happens to a text's memory when it has ended; it holds no stream, which may be dropped meanwhile."""

    def __init__(self, conversation: Conversation, sequence: Sequence, keeps: bool) -> None:
        self._conversation, self._sequence, self._keeps = conversation, sequence, keeps

    def __call__(self) -> None:
        self._conversation.end(self._sequence.new_tokens)
        if not self._keeps:
            self._conversation.close()
