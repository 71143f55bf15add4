"""Prompt lookup: no model, the text itself is the draft. What followed the last few tokens before may follow again.

Prompt lookup decoding (Saxena 2023) takes one match; here the latest matches of the longest n-gram make one tree,
weighted by how many of them go on alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from dovetail.runtime.draft import Foresight, blind
from dovetail.runtime.policy import Growth
from dovetail.runtime.tree import Float32s, Int64s, Tree, TreeBuilder

NGRAMS = (4, 3, 2)  # tokens that must match; the longest that does is taken
MAX_MATCHES = 16  # the latest ones: near text is the better guess, and a round stays short
# A continuation that all matches share comes true about this often (held-out code, greedy): what makes scores fall with
# depth, so that a policy can weigh a long chain against a wide tree.
AGAIN = 0.8


class LookupDraft:
    """See `SequenceDraft`. It has no engine; its time is the host's."""

    native_s = 0.0
    bytes_in = bytes_out = 0

    def __init__(self) -> None:
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram -> positions behind its occurrences, ascending

    @property
    def known(self) -> int:
        """Tokens of the text."""
        return len(self._text)

    def truncate(self, known: int) -> None:
        """Forget the tokens from `known` on."""
        assert 0 <= known <= self.known
        for end in range(self.known, known, -1):
            for gram in self._grams(end):
                self._ends[gram].pop()
        del self._text[known:]

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        """See `Draft.propose`."""
        for token in tokens.tolist():
            self._text.append(token)
            for gram in self._grams(self.known):
                self._ends.setdefault(gram, []).append(self.known)
        builder = TreeBuilder(self._text[-1])
        level = [(0, self._matches())]  # candidates, and where in the text each one's matches stand
        depth, scores = 0, [0.0]
        while level[0][1] and growth.goes_on(depth, scores):
            parents, children, steps, matches = [], [], [], []
            for candidate, positions in level:
                for token, following in self._continuations(positions)[: growth.width]:
                    parents.append(candidate)
                    children.append(token)
                    steps.append(math.log(AGAIN * len(following) / len(positions)))
                    matches.append([position for position in following if position < self.known])
            first = builder.add_level(parents, children, steps)
            level = [(first + i, positions) for i, positions in enumerate(matches) if positions] or [(0, [])]
            depth, scores = depth + 1, builder.newest_scores
        return builder.best(growth.drafted)

    def _grams(self, end: int) -> Iterator[tuple[int, ...]]:
        return (tuple(self._text[end - size : end]) for size in NGRAMS if size <= end)

    def _matches(self) -> list[int]:
        """Positions behind earlier occurrences of the text's last n-gram, the longest that occurred."""
        for gram in self._grams(self.known):
            earlier = self._ends[gram][-MAX_MATCHES - 1 : -1]
            if earlier:
                return earlier
        return []

    def _continuations(self, positions: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(token at some of `positions`, the positions behind those), the most frequent first, of equals the latest."""
        behind = defaultdict(list)
        for position in reversed(positions):
            behind[self._text[position]].append(position + 1)
        return sorted(behind.items(), key=lambda item: len(item[1]), reverse=True)
