"""A target and its draft as calibration sees them: continued round by round, read position by position, or generating.

Letters: n tokens of a text, D feature size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dovetail.runtime.decoding.drafting import DraftedTree
from dovetail.runtime.decoding.engine import Engine, PassCost, Update
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.decoding.text_cache import TextCache, shared_length
from dovetail.runtime.drafts.base import Draft, Foresight, blind
from dovetail.runtime.drafts.graph_contract import DraftGraph
from dovetail.runtime.drafts.joint_calls import JointCalls
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.policies.base import Policy, TreeBudget
from dovetail.runtime.policies.costs import ASSUMED
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import Step, TargetEngine, read
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import CandidateTree, Float32s, Int64s, root_only
from dovetail.runtime.trees.verified import Verified

if TYPE_CHECKING:
    from dovetail.runtime.pipeline import Pipeline

_BATCH = 8  # texts that are made in one pass of the target: at this size a pass costs hardly more than for one


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A prompt and the target's own continuation, with the features of all but the last token. If it `has_ended`, that
    is an end token; else the text was cut off.
    """

    tokens: Int64s  # [n]
    features: Float32s  # [n - 1, D]
    prompt_length: int
    has_ended: bool
    sampler: Sampler  # as it was before the first draw


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One text made to its end: tokens behind the first, which comes with the prompt, and their time. None, if the
    first one ends it.
    """

    tokens: int
    ms: float
    rounds: int


class Rounds(Protocol):
    """Real rounds of several texts at once, on demand."""

    def next(self, shape: TreeShape) -> PassCost:
        """A round in which every text gets a tree of `shape`, or what its draft can give of it."""
        ...

    def close(self) -> None:
        """Forget the texts."""
        ...


class Reader(Protocol):
    """A draft that is shown a text of which everything is known."""

    def grow(self, verified: Verified, budget: TreeBudget, foresight: Foresight) -> CandidateTree:
        """What it would offer behind `verified`, which goes on where the last call ended."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class Pair(Protocol):
    """Target and draft on this machine. The planted tests have one made of sleeps."""

    @property
    def width(self) -> int: ...  # children per row that the draft can give
    @property
    def context_length(self) -> int: ...
    @property
    def looks_up(self) -> bool: ...  # whether matches in the text are taken, too
    @property
    def branches_cost(self) -> bool: ...  # see `Costs`

    def rounds(self, prompt: Sequence[int], texts: int, room: int) -> Rounds:
        """Greedy rounds of `texts` texts behind `prompt`, which begin anew when they are `room` tokens longer."""
        ...

    def texts(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float) -> Iterator[Text]:
        """The target's continuations of `prompts`, each to its end or to `new_tokens`."""
        ...

    def reader(self) -> Reader:
        """The draft at the beginning of a text."""
        ...

    def generate(self, prompt: Sequence[int], policy: Policy, temperature: float, seed: int, new_tokens: int) -> Run:
        """What a user gets, to the end of the text or `new_tokens`."""
        ...


class PipelinePair:
    """The two models of an open pipeline, which must have room for several sequences."""

    def __init__(self, pipe: Pipeline) -> None:
        assert pipe.draft is not None
        self._pipe, self._graph = pipe, pipe.draft
        self.width = pipe.draft.info.top_k
        self.context_length = pipe.ctx_size
        self.looks_up = pipe.looks_up
        self.branches_cost = pipe.target.acceptance == "confirmed"

    def rounds(self, prompt: Sequence[int], texts: int, room: int) -> EngineRounds:
        """See `Pair`."""
        return EngineRounds(self._pipe.target, self._graph, prompt, texts, room)

    def texts(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float) -> Iterator[Text]:
        """See `Pair`. Up to eight texts share a pass."""
        longest = max(map(len, prompts)) + new_tokens
        batch = min(_BATCH, self._pipe.target.free // (longest + _BATCH * _BATCH))
        assert batch >= 1
        for begin in range(0, len(prompts), batch):
            yield from self._batch(prompts[begin : begin + batch], new_tokens, temperature, begin)

    def _batch(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float, number: int) -> list[Text]:
        target = self._pipe.target
        config = self._pipe.config(GenerationConfig(temperature=temperature))
        ends = config.eos_token_id
        samplers, fresh = (
            [Sampler(config, prompt, target.info.vocab_size, number + i) for i, prompt in enumerate(prompts)]
            for _ in range(2)
        )
        sequences = [target.sequence() for _ in prompts]
        try:
            texts = [list(prompt) for prompt in prompts]
            features = [
                [read(target, sequence, np.array(prompt[:-1], np.int64)).features]
                for sequence, prompt in zip(sequences, prompts, strict=True)
            ]
            going = list(range(len(texts)))
            for _ in range(new_tokens):
                outputs = target.forward([Step(sequences[i], root_only(texts[i][-1])) for i in going])
                for i, out in zip(going, outputs, strict=True):
                    features[i].append(out.features.copy())
                    texts[i].append(samplers[i].draw(out.logits[0]))
                    sequences[i].commit([0])
                going = [i for i in going if texts[i][-1] not in ends]
                if not going:
                    break
        finally:
            for sequence in sequences:
                sequence.close()
        return [
            Text(np.array(text, np.int64), np.concatenate(rows), len(prompt), text[-1] in ends, sampler)
            for text, rows, prompt, sampler in zip(texts, features, prompts, fresh, strict=True)
        ]

    def reader(self) -> DraftReader:
        """See `Pair`."""
        return DraftReader(ModelDraft(self._graph), JointCalls(self._graph))

    def generate(self, prompt: Sequence[int], policy: Policy, temperature: float, seed: int, new_tokens: int) -> Run:
        """See `Pair`."""
        config = GenerationConfig(temperature=temperature, seed=seed, max_new_tokens=new_tokens)
        generation = self._pipe.stream(list(prompt), config, policy=policy).finish()
        return Run(generation.completion_tokens - 1, generation.decode_ms, generation.totals.rounds)


class DraftReader:
    """See `Reader`."""

    def __init__(self, draft: Draft, calls: JointCalls) -> None:
        self._draft, self._calls = draft, calls

    def grow(self, verified: Verified, budget: TreeBudget, foresight: Foresight) -> CandidateTree:
        """See `Reader`."""
        self._draft.tell(verified)
        growth = self._draft.grow(int(verified.tokens[-1]), budget, foresight)
        self._calls.grow([growth], budget.width)
        return growth.candidates

    def close(self) -> None:
        """Give the draft's memory back."""
        self._draft.close()


class EngineRounds:
    """An engine of its own over the two models. See `Rounds`."""

    def __init__(self, target: TargetEngine, graph: DraftGraph, prompt: Sequence[int], texts: int, room: int) -> None:
        self._target, self._prompt, self._room = target, list(prompt), room
        free_branches = dataclasses.replace(ASSUMED, branches_cost=False)  # see `_Chained`
        self._engine = Engine(target, RoundPlanner(free_branches, keeps_size=False), graph, texts)
        self._caches = [TextCache(target.sequence(), ModelDraft(graph), None) for _ in range(texts)]
        self._sequences: list[TextSequence] = []

    def next(self, shape: TreeShape) -> PassCost:
        """See `Rounds`. Both caches are kept: beginning again behind the same prompt costs one token of prefill."""
        if any(sequence.room <= shape.depth + 1 for sequence in self._sequences) or not self._sequences:
            self._begin()
        return self._round(shape)

    def close(self) -> None:
        """See `Rounds`."""
        self._end()
        for cache in self._caches:
            cache.close()

    def _begin(self) -> None:
        texts = [sequence.text for sequence in self._end()] or [[] for _ in self._caches]
        for text, cache in zip(texts, self._caches, strict=True):
            cache.roll_back(shared_length(text, self._prompt))
            sampler = Sampler(GenerationConfig(), self._prompt, self._target.info.vocab_size)
            sequence = _Chained(
                self._prompt,
                cache,
                sampler=sampler,
                pace=Pace(Policy("plain")),
                max_new_tokens=self._room,
                foresight=blind,
                window=self._target.window,
            )
            self._sequences.append(sequence)
            self._engine.add(sequence, self._ignore, _nothing)
        while not all(sequence.is_decoding for sequence in self._sequences):
            waiting = sum(sequence.unread for sequence in self._sequences)
            updates = self._engine.step()
            assert all(update.sequence.error is None for update in updates), updates[0].sequence.error
            idle = waiting == sum(sequence.unread for sequence in self._sequences)
            assert not idle, "the cache has no room for all that is measured"
        # A round in which the drafts read the prompts is no sample.
        self._round(TreeShape(2, 1, 1))

    def _round(self, shape: TreeShape) -> PassCost:
        policy = Policy("plain") if shape.nodes == 1 else Policy("fixed", shape, is_wish=True)
        for sequence in self._sequences:
            sequence.pace = Pace(policy)
        updates = self._engine.step()
        cost = updates[0].cost
        if cost is None:
            error = self._sequences[0].error
            raise AssertionError("a round failed") if error is None else error
        return cost

    def _end(self) -> list[TextSequence]:
        sequences, self._sequences = self._sequences, []
        for sequence in sequences:
            sequence.is_cancelled = True
        self._engine.sweep()
        return sequences

    def _ignore(self, update: Update) -> None:
        """The rounds are looked at, not the text."""


class _Chained(TextSequence):
    """A text whose trees are verified as chains of as many nodes: what a pass costs is asked of its rows."""

    def plan_tree(self, drafted: DraftedTree) -> Step:
        """See `Sequence`. A node's row is that of its place in the chain, so the text stays the target's own."""
        chained = CandidateTree(self.root)
        for i, token in enumerate(drafted.candidates.tokens_of(drafted.kept)):
            chained.add_level([i], [token], [0.0])
        return super().plan_tree(dataclasses.replace(drafted, candidates=chained, kept=chained.ranked))


def _nothing() -> None:
    """The caches are kept."""
