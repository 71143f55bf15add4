"""A target and its draft as calibration sees them: continued round by round, read position by position, or generating.

Letters: n tokens of a text, D feature size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dovetail.runtime.decoding.rounds import Round, rounds
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.trees.shape import MAX_TREE_NODES
from dovetail.runtime.trees.tree import Float32s, Int64s, root_only

if TYPE_CHECKING:
    from dovetail.runtime.drafts.base import Draft, RewindableDraft
    from dovetail.runtime.pipeline import Pipeline
    from dovetail.runtime.targets.openvino.engine import TargetSequence

_BATCH = 8  # texts that are made in one call of the target: at this size a pass costs hardly more than for one


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A prompt and the target's own continuation, with the features of all but the last token."""

    tokens: Int64s  # [n]
    features: Float32s  # [n - 1, D]
    prompt_length: int
    sampler: Sampler  # as it was before the first draw


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One text made from end to end: tokens behind the first, which comes with the prompt, and their time."""

    tokens: int
    ms: float
    rounds: int


class Pair(Protocol):
    """Target and draft on this machine. The planted tests have one made of sleeps."""

    @property
    def width(self) -> int: ...  # children per row that the draft can give
    @property
    def context_length(self) -> int: ...
    @property
    def looks_up(self) -> bool: ...  # whether matches in the text are taken, too
    @property
    def draft_s(self) -> float: ...  # seconds spent in the draft's engine so far

    def continue_from(self, prompt: Sequence[int], policy: Policy) -> Iterator[Round]:
        """Greedy rounds behind `prompt`, as long as the room lasts. Nobody watches the draft."""
        ...

    def close(self) -> None:
        """Forget the texts of `continue_from`."""
        ...

    def texts(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float) -> Iterator[Text]:
        """The target's continuations of `prompts`, all of one length."""
        ...

    def reader(self) -> Draft:
        """The draft at the beginning of a text."""
        ...

    def generate(self, prompt: Sequence[int], policy: Policy, temperature: float, seed: int, new_tokens: int) -> Run:
        """What a user gets."""
        ...


class PipelinePair:
    """The two models of an open pipeline, which must have room for several sequences."""

    def __init__(self, pipe: Pipeline, room: int) -> None:
        """`room`: new tokens that `continue_from` may add to a prompt."""
        assert pipe.draft is not None
        self._pipe, self._draft, self._room = pipe, pipe.draft, room
        self.width = self._draft.info.top_k
        self.context_length = pipe.ctx_size
        self.looks_up = pipe.mixes
        self._open: dict[tuple[int, ...], tuple[TargetSequence, RewindableDraft]] = {}

    @property
    def draft_s(self) -> float:
        """See `Pair`."""
        return self._draft.native_s

    def continue_from(self, prompt: Sequence[int], policy: Policy) -> Iterator[Round]:
        """See `Pair`. Both caches are kept: beginning again behind the same prompt costs one token of prefill."""
        key = tuple(prompt)
        if key not in self._open:
            self._open[key] = self._pipe.target.sequence(), self._draft.sequence()
        target, draft = self._open[key]
        kept = max(len(prompt) - 2, 0)
        if target.length > kept:
            target.truncate(kept)
            draft.truncate(kept)
        else:
            assert target.length == 0
        target.reserve(len(prompt) - target.length + self._room + MAX_TREE_NODES)
        rest = np.array(prompt[target.length :], np.int64)
        return rounds(target, draft, policy, _greedy, rest, self._room)

    def close(self) -> None:
        """See `Pair`."""
        for target, _ in self._open.values():
            target.close()
        self._open.clear()

    def texts(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float) -> Iterator[Text]:
        """See `Pair`. Up to eight texts share a pass."""
        pool = self._pipe.target.pool
        longest = max(map(len, prompts)) + new_tokens
        batch = min(_BATCH, pool.num_free * pool.block_size // (longest + pool.block_size))
        assert batch >= 1
        for begin in range(0, len(prompts), batch):
            yield from self._batch(prompts[begin : begin + batch], new_tokens, temperature, begin)

    def _batch(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float, number: int) -> list[Text]:
        model = self._pipe.target
        config = GenerationConfig(temperature=temperature)
        samplers, fresh = (
            [Sampler(config, prompt, model.info.vocab_size, number + i) for i, prompt in enumerate(prompts)]
            for _ in range(2)
        )
        sequences = [model.sequence() for _ in prompts]
        try:
            texts = [list(prompt) for prompt in prompts]
            features = [
                [sequence.prefill(np.array(prompt[:-1], np.int64)).features]
                for sequence, prompt in zip(sequences, prompts, strict=True)
            ]
            for _ in range(new_tokens):
                steps = [sequence.step(root_only(text[-1])) for sequence, text in zip(sequences, texts, strict=True)]
                for i, out in enumerate(model.forward(steps)):
                    features[i].append(out.features.copy())
                    texts[i].append(samplers[i].draw(out.logits[0]))
                    sequences[i].commit([0])
        finally:
            for sequence in sequences:
                sequence.close()
        return [
            Text(np.array(text, np.int64), np.concatenate(rows), len(prompt), sampler)
            for text, rows, prompt, sampler in zip(texts, features, prompts, fresh, strict=True)
        ]

    def reader(self) -> Draft:
        """See `Pair`."""
        return self._draft.sequence()

    def generate(self, prompt: Sequence[int], policy: Policy, temperature: float, seed: int, new_tokens: int) -> Run:
        """See `Pair`."""
        self._pipe.policy = policy
        done = self._pipe.generate(
            list(prompt),
            GenerationConfig(),
            temperature=temperature,
            seed=seed,
            max_new_tokens=new_tokens,
            ignore_eos=True,
        )
        return Run(done.completion_tokens - 1, done.decode_ms, done.totals.rounds)


def _greedy(logits: Float32s) -> int:
    return int(logits.argmax())
