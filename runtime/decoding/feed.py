"""Many requests, answered in their order: the engine is fed as it empties, however many there are."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dovetail.runtime.decoding.generation import Generation
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.errors import DrawError, UserError
from dovetail.runtime.sampling.config import GenerationConfig

if TYPE_CHECKING:
    from dovetail.runtime.pipeline import Pipeline, Prompt

LOOK_AHEAD = 4  # requests that may be begun or done before the oldest one is, as a multiple of the texts in a pass


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how it is answered; a config of None means the artifact's own defaults. For
    `chat_template_kwargs` see `Pipeline.encode`."""

    prompt: Prompt
    config: GenerationConfig | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request: its `num_return_sequences` generations, or the error that ended it alone."""

    generations: list[Generation]
    error: UserError | DrawError | None = None


class Feed:
    """Takes requests one by one while there is room in the engine, and gives their outcomes in the same order.

    Iterate it, or call `advance` until `is_done`. At most `look_ahead` requests are taken beyond the oldest one whose
    outcome is awaited: so many texts wait in memory while a slow one is made.

        taken     1 2 3 4 5 6 7 8          3 texts in a pass, look_ahead 8
        done        x x   x   x            1 is slow: 4, 6 and 8 run beside it
        given     none, before 1 is done   9 is not taken yet
    """

    def __init__(
        self, pipe: Pipeline, requests: Iterable[Request | UserError], *, look_ahead: int | None = None
    ) -> None:
        """An error among the `requests` stands for one that could not be read, and comes out in its place."""
        self.tokens = 0  # made so far, those behind a stop string too
        self.passes = 0
        self._pipe = pipe
        self._source = iter(requests)
        self._look_ahead = look_ahead or LOOK_AHEAD * pipe.max_texts
        self._places: deque[_Place] = deque()
        self._has_ended = False

    @property
    def is_done(self) -> bool:
        """Whether every outcome was given."""
        return self._has_ended and not self._places

    def advance(self) -> list[Outcome]:
        """Take requests, move all their texts on by one pass, and give the outcomes whose turn it is.

        Raises whatever is not one request's own fault; `close` then ends the others.
        """
        self._fill()
        if any(place.outcome is None for place in self._places):
            with self._pipe.engine.lock:
                updates = self._pipe.engine.step()
            self.tokens += sum(len(update.tokens) for update in updates)
            self.passes += any(update.cost is not None for update in updates)
        outcomes = []
        for place in self._places:
            place.settle()
        while self._places and (outcome := self._places[0].outcome) is not None:
            outcomes.append(outcome)
            self._places.popleft()
        return outcomes

    def __iter__(self) -> Iterator[Outcome]:
        try:
            while not self.is_done:
                yield from self.advance()
        finally:
            self.close()

    def close(self) -> None:
        """End whatever still runs. Nothing is given any more."""
        self._has_ended = True
        for place in self._places:
            place.close()
        self._places.clear()

    def _fill(self) -> None:
        """Take requests until every place in the pass is filled, or as many are taken as may be."""
        running = sum(place.running for place in self._places)
        while not self._has_ended and running < self._pipe.max_texts and len(self._places) < self._look_ahead:
            request = next(self._source, None)
            if request is None:
                self._has_ended = True
                return
            self._places.append(_Place(self._pipe, request))
            running += self._places[-1].running


class _Place:
    """One request in the order: the streams that answer it, and then its outcome."""

    def __init__(self, pipe: Pipeline, request: Request | UserError) -> None:
        self.outcome: Outcome | None = None
        self._streams: list[Stream] = []
        if isinstance(request, UserError):
            self.outcome = Outcome([], request)
            return
        try:
            config = pipe.config(request.config)
            ids = pipe.encode(request.prompt, None, request.chat_template_kwargs)
            self._streams = [pipe.stream(ids, config, sequence=number) for number in range(config.num_return_sequences)]
            self._streams[0].share_prompt(self._streams[1:])
        except UserError as error:
            self.outcome = Outcome([], error)

    @property
    def running(self) -> int:
        """Texts of it that have not ended."""
        return sum(stream.finish_reason is None for stream in self._streams)

    def settle(self) -> None:
        """Once all texts of it have ended, keep what they brought and nothing else."""
        if self.outcome is not None or self.running:
            return
        try:
            self.outcome = Outcome([stream.finish() for stream in self._streams])
        except (UserError, DrawError) as error:
            self.outcome = Outcome([], error)
        self.close()

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self._streams = []
