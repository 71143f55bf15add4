"""One text while it is made: what it feeds into the next pass, and what it takes from it. No locks, threads or clocks.

Letters: N nodes of a tree, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from dovetail.runtime.decoding.drafting import DraftedTree
from dovetail.runtime.decoding.text_cache import TextCache
from dovetail.runtime.drafts.base import Draft, Foresight
from dovetail.runtime.errors import CacheFullError
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import Step, StepOutput
from dovetail.runtime.trees.acceptance import accept
from dovetail.runtime.trees.tree import Float32s, Tree, chain


class Sequence:
    """A prompt, and the tokens that were drawn behind it.

    The target's cache holds a front of `text`, at most all but the last token. What it lacks is read in chunks; when
    one drawn token is left, that is the root of a tree. So a new text, one that goes on with what a conversation holds,
    and one that was preempted and lost its pages are the same: they differ in how much is unread.
    """

    def __init__(
        self,
        prompt: Items[int],
        cache: TextCache,
        *,
        sampler: Sampler,
        pace: Pace,
        max_new_tokens: int,
        ends: frozenset[int] = frozenset(),
        foresight: Foresight,
        window: int | None = None,
        rope_border: int | None = None,
    ) -> None:
        """Up to `max_new_tokens` >= 1 tokens, or to one of `ends`. `foresight`: what the drafts may know of the
        sampler's draws; `window`: see `TargetEngine`; `rope_border`: see `TargetInfo`.
        """
        self.text = list(prompt)
        self.prompt_length = len(self.text)
        self.cache = cache
        self.pace = pace
        self.foresight = foresight
        self.finish_reason: str | None = None  # stop, length, cancelled or error
        self.error: Exception | None = None
        self.is_cancelled = False
        self.preemptions = 0
        self.reused = 0  # tokens of the prompt that were in the cache already
        self.drawn_before: Items[range] = []  # positions of the prompt that were drawn in earlier turns
        self.siblings: list[Sequence] = []  # further answers to the same prompt, which wait until it is read
        self._sampler, self._max_new_tokens, self._ends, self._window = sampler, max_new_tokens, ends, window
        self._rope_border = rope_border
        self._tree = chain(np.array(self.text[:1], np.int64))  # what the pass verifies
        self._drafted: DraftedTree | None = None  # None: the pass reads a chunk
        self._prompt_features = np.empty((0, 0), np.float32)  # [m, D] for the siblings' drafts
        self._begin = 0  # of those
        self._mark = (self.prompt_length, 0)

    # What a planner and a draft look at.

    @property
    def unread(self) -> int:
        """Tokens of the text that the target's cache lacks."""
        return len(self.text) - self.cache.target.length

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is unread, and was drawn: it is the root of the next tree."""
        return self.unread == 1 and len(self.text) > self.prompt_length

    @property
    def readable(self) -> int:
        """How many of the unread tokens one pass may read: the first ones, as far as they were all given, or all
        drawn. Those are computed otherwise than these (see `Step.is_prompt`), whenever they are read.
        """
        begin, end = self.context, len(self.text)
        borders = [self.prompt_length, *(border for span in self.drawn_before for border in (span.start, span.stop))]
        return min((border for border in borders if begin < border < end), default=end) - begin

    def _is_drawn(self, position: int) -> bool:
        return position >= self.prompt_length or any(position in span for span in self.drawn_before)

    @property
    def root(self) -> int:
        """The last token."""
        return self.text[-1]

    @property
    def new_tokens(self) -> list[int]:
        """What was drawn so far."""
        return self.text[self.prompt_length :]

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self._max_new_tokens - (len(self.text) - self.prompt_length)

    @property
    def reach(self) -> int:
        """How deep its tree may be: the last token that may come needs no node, and no pass reaches over the border
        behind which all rows of a text become others.
        """
        border, length = self._rope_border, len(self.text)
        return self.room - 1 if border is None or length > border else min(self.room - 1, border - length)

    @property
    def context(self) -> int:
        """Tokens in the target's cache."""
        return self.cache.target.length

    @property
    def model(self) -> Draft | None:
        """The draft model, unless it was given up."""
        model = self.cache.model
        return model if model is not None and model.failure is None else None

    @property
    def lookup(self) -> Draft | None:
        """Matches in the text."""
        return self.cache.lookup

    @property
    def only_chains(self) -> bool:
        """Where a tree is one block, the target counts its window in cache slots. In a chain slots are positions; a
        sibling's slot between a node and its ancestors would push the oldest token that the node still sees out of the
        window. Siblings need three nodes.
        """
        return self._window is not None and self._window - self.context <= 2

    # A step: plan, then take; or rewind.

    def plan_chunk(self, count: int) -> Step:
        """Read the next `count` of the `readable` tokens; with the last one of all the next token can be drawn."""
        begin = self.context
        self._drafted = None
        self._tree = chain(np.array(self.text[begin : begin + count], np.int64))
        wanted = [count - 1] if count == self.unread else []
        return Step(self.cache.target, self._tree, wanted, is_prompt=not self._is_drawn(begin))

    def plan_tree(self, drafted: DraftedTree) -> Step:
        """Verify the best candidates behind the last token."""
        tree = drafted.tree
        if self._window is not None and self.context + len(tree) > self._window:
            tree = tree.first_chain()
        try:
            self.cache.target.reserve_tree(tree)
        except CacheFullError:  # of the branches: the text itself has room
            tree = tree.first_chain()
        self._drafted, self._tree = drafted, tree
        return Step(self.cache.target, tree)

    @property
    def tree(self) -> Tree:
        """What the pass verifies."""
        return self._tree

    @property
    def is_reading(self) -> bool:
        """Whether the pass reads a chunk of the text."""
        return self._drafted is None

    def mark(self) -> None:
        """A step begins, to which `rewind` can return."""
        self._mark = (len(self.text), self.context)

    def take(self, out: StepOutput) -> list[int]:
        """Draw, commit, and tell the drafts; the new tokens. Raises `DrawError` if none can be drawn."""
        begin = self.context
        path: Items[int] = range(len(self._tree))
        tokens: list[int] = []
        if self._drafted is not None:
            accepted = accept(self._tree, out.logits, self._sampler.draw, self.room, self._ends)
            path, tokens = accepted.path, accepted.tokens
            self.pace.observe(self._drafted.verdict(accepted.accept_length))
        elif len(out.logits):
            tokens = [self._sampler.draw(out.logits[0])]
        features = out.features if self._drafted is None else out.features[path]  # [m, D]
        self.cache.target.commit(path)
        self.text += tokens
        told = self.text if tokens else self.text[: self.context + 1]
        self.cache.tell(told, begin, features)
        if self.siblings:
            self._hand_prompt(begin, features)
        if tokens and tokens[-1] in self._ends:
            self.finish_reason = "stop"
        elif self.room <= 0:
            self.finish_reason = "length"
        self.cache.target.set_text_length(len(self.text))
        return tokens

    def rewind(self) -> None:
        """Undo the step since `mark`, however far it came: the text and both models are as before."""
        length, context = self._mark
        self.finish_reason = self.error = None
        del self.text[length:]
        self._sampler.rewind(length - self.prompt_length)
        self.cache.truncate(context)
        self.cache.target.set_text_length(length)

    def _hand_prompt(self, begin: int, features: Float32s) -> None:
        """Give the siblings what was read of the prompt, when all of it is."""
        if self.model is not None:
            before = self._prompt_features[: max(begin - self._begin, 0)]  # a chunk may be read twice
            if not len(before):
                self._begin, before = begin, features[:0]
            self._prompt_features = np.concatenate([before, features])
        if self.context < self.prompt_length:
            return
        kept = self.prompt_length - 1
        for sibling in self.siblings:
            if sibling.finish_reason is not None:
                continue
            try:
                fork = self.cache.target.fork()
            except CacheFullError:  # it reads the prompt itself, when there is room
                continue
            fork.truncate(kept)
            sibling.cache.target.close()
            sibling.cache.target = fork
            sibling.reused = kept
            if self.model is not None and kept > self._begin:
                rows = self._prompt_features[: kept - self._begin]
                sibling.cache.tell(sibling.text[: kept + 1], self._begin, rows)
        self.siblings = []
        self._prompt_features = self._prompt_features[:0]

    # How it ends.

    def end(self, reason: str, error: Exception | None = None) -> None:
        """No step follows. The first reason counts."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error

    def keep(self, count: int) -> None:
        """Forget what was drawn behind the first `count` new tokens, where plain decoding had stopped: a later turn of
        the conversation finds the same in the cache.
        """
        del self.text[self.prompt_length + count :]
        self.cache.truncate(min(self.context, len(self.text) - 1))
        self.cache.target.set_text_length(len(self.text))

    def preempt(self) -> None:
        """Give the target's pages back; what they held is read again later."""
        self.preemptions += 1
        self.cache.target.truncate(0)
