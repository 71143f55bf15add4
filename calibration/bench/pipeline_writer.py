"""Our pipeline as a writer of the table of losslessness: how it decodes in every way, by what users call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dovetail.calibration.bench import lossless
from dovetail.calibration.bench.lossless import Text, Written, few_pages
from dovetail.runtime.decoding.generation import Generation
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.sampling.config import ALL_THAT_IS_LEFT, GenerationConfig
from dovetail.runtime.targets.openvino.engine import OpenVinoTarget

Make = Callable[[Pipeline, Sequence[Text], GenerationConfig], list[list[Generation]]]
"""What a way makes: for every text one answer, or two of a conversation."""


class PipelineWriter:
    """See `Writer`."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    def write(self, way: str, texts: Sequence[Text], controls: dict[str, Any], tokens: int, seed: int) -> Written:
        """Token ids and log-probabilities of every text."""
        config = GenerationConfig(max_new_tokens=tokens, seed=seed, ignore_eos=True, logprobs=1, **controls)
        answers = _MAKERS[way](self._pipe, texts, config)
        every = [one for text in answers for one in text]
        return Written(
            [[(one.token_ids, one.logprobs) for one in text] for text in answers],
            sum(one.totals.accepted_tokens for one in every),
            sum(one.preemptions for one in every),
            [one.draft_failure for one in every if one.draft_failure],
        )

    def close(self) -> None:
        """Free the models."""
        self._pipe.close()


def _alone(pipe: Pipeline, texts: Sequence[Text], config: GenerationConfig) -> list[list[Generation]]:
    return [[pipe.generate(text.question, config)] for text in texts]


def _together(pipe: Pipeline, texts: Sequence[Text], config: GenerationConfig) -> list[list[Generation]]:
    return [[answer] for answer in pipe.generate([text.question for text in texts], config)]


def _preempted(pipe: Pipeline, texts: Sequence[Text], config: GenerationConfig) -> list[list[Generation]]:
    assert isinstance(pipe.target, OpenVinoTarget)
    assert config.max_new_tokens is not None
    with _pages_left(pipe.target, few_pages(texts, config.max_new_tokens, pipe.target.pool.page_size)):
        return _together(pipe, texts, config)


@contextlib.contextmanager
def _pages_left(target: OpenVinoTarget, count: int) -> Iterator[None]:
    taken = target.pool.take(max(target.pool.num_free - count, 0))
    try:
        yield
    finally:
        target.pool.give_back(taken)


def _long_alone(pipe: Pipeline, texts: Sequence[Text], config: GenerationConfig) -> list[list[Generation]]:
    return [[pipe.generate(text.long, config)] for text in texts]


def _long_beside(pipe: Pipeline, texts: Sequence[Text], config: GenerationConfig) -> list[list[Generation]]:
    """Beside a text that decodes, so that a pass reads a smaller part of it than when it is alone."""
    answers = []
    for text in texts:
        with pipe.stream(text.question, config, max_new_tokens=ALL_THAT_IS_LEFT, stop_strings=()) as neighbour:
            next(neighbour)
            stream = pipe.stream(text.long, config)
            next(stream)  # the prompt was read
            assert neighbour.finish_reason is None, "it decodes longer than the prompt is read"
            answers.append([stream.finish()])
    return answers


def _second_turn(
    pipe: Pipeline, texts: Sequence[Text], config: GenerationConfig, is_cached: bool = True
) -> list[list[Generation]]:
    """What was drawn in the first turn stays drawn, whether its keys are still there or not: see `Conversation`."""
    answers = []
    for text in texts:
        with pipe.conversation() as conversation:
            first = pipe.stream(text.question, config, conversation=conversation).finish()
            if not is_cached:
                conversation.evict()
            prompt = [*text.question, *first.token_ids, *text.follow_up]
            answers.append([first, pipe.stream(prompt, config, conversation=conversation).finish()])
    return answers


def _second_turn_anew(pipe: Pipeline, texts: Sequence[Text], config: GenerationConfig) -> list[list[Generation]]:
    return _second_turn(pipe, texts, config, is_cached=False)


_MAKERS: dict[str, Make] = {
    lossless.ALONE: _alone,
    lossless.TOGETHER_WAY: _together,
    lossless.LONG_ALONE: _long_alone,
    lossless.CHUNKS: _long_beside,
    lossless.READ_ANEW: _second_turn_anew,
    lossless.CACHED: _second_turn,
    lossless.PREEMPTED: _preempted,
}
