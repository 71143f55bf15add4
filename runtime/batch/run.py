"""A batch while it runs: lines become requests, outcomes become lines of the output."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dovetail.runtime.artifact.manifest import CHAT_TEMPLATE
from dovetail.runtime.batch.line import Line
from dovetail.runtime.batch.results import Results
from dovetail.runtime.decoding.feed import Feed, Request
from dovetail.runtime.errors import UserError
from dovetail.runtime.sampling.config import GenerationConfig

if TYPE_CHECKING:
    from dovetail.runtime.batch.output_file import OutputFile
    from dovetail.runtime.pipeline import Pipeline

_SEEDS = 1 << 64


@dataclasses.dataclass(slots=True)
class Figures:
    """What was done in one run of the command; `tokens` are those of the answers."""

    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """All texts together, their prompts' reading included."""
        return self.tokens / self.seconds if self.seconds else 0.0


class BatchRun:
    """Call `advance` until `is_done`, then or earlier `close`."""

    def __init__(
        self,
        pipe: Pipeline,
        config: GenerationConfig,
        lines: Iterator[Line],
        out: OutputFile,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Answers `lines` into `out`, which has begun; their own controls win over `config`, and their own
        `chat_template_kwargs` over those given here."""
        self.figures = Figures()
        self._variables = chat_template_kwargs or {}
        self._out, self._config = out, config
        self._has_chat_template = pipe.artifact.has(CHAT_TEMPLATE) or pipe.engine_config.chat_template is not None
        self._results = Results(pipe.artifact.manifest.name, pipe.tokenizer, out.batch_id)
        self._taken: deque[Line] = deque()  # not written yet
        self._feed = Feed(pipe, self._requests(lines))
        self._start = time.perf_counter()

    @property
    def is_done(self) -> bool:
        """Whether every line is written."""
        return self._feed.is_done

    @property
    def pace(self) -> float:
        """Tokens per second, those of unfinished texts included."""
        return self._feed.tokens / self.figures.seconds

    def advance(self) -> None:
        """One pass for as many lines as fit, then write those whose turn it is. Raises what is not a line's fault."""
        figures = self.figures
        for outcome in self._feed.advance():
            line = self._taken.popleft()
            if outcome.error is None:
                figures.prompt_tokens += outcome.generations[0].prompt_tokens
                figures.tokens += sum(answer.completion_tokens for answer in outcome.generations)
                self._out.write(line.number, self._results.done(line, outcome.generations))
            else:
                self._out.write(line.number, self._results.failed(line, outcome.error))
        figures.seconds, figures.passes = time.perf_counter() - self._start, self._feed.passes

    def close(self) -> None:
        """End the texts that are not done."""
        self._feed.close()

    def _requests(self, lines: Iterator[Line]) -> Iterator[Request | UserError]:
        for line in lines:
            self._taken.append(line)
            yield line.error or self._request(line)

    def _request(self, line: Line) -> Request | UserError:
        seed = (self._out.seed + line.number - 1) % _SEEDS
        try:
            config = self._config.with_changes(**{"seed": seed, **line.controls})
        except UserError as error:
            return error
        prompt = line.prompt(self._has_chat_template)
        is_chat = not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
        return Request(prompt, config, {**self._variables, **line.chat_template_kwargs} if is_chat else None)
