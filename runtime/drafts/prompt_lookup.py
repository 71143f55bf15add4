"""Prompt lookup: no model, the text itself is the draft. What followed the last few tokens before may follow again.

Prompt lookup decoding (Saxena 2023) takes one match, and so many tokens behind it. Here the latest matches of the
longest n-gram make one tree, weighted by how many of them go on alike and by how far back they match: two tokens in
common may be chance, thirty are a copy. What is too unlikely to earn its place in the target's pass is not offered.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from dovetail.runtime.drafts.base import Foresight, blind
from dovetail.runtime.policies.base import Growth
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, TreeBuilder

NGRAMS = (4, 3, 2)  # tokens that must match; the longest that does is taken
MAX_MATCHES = 16  # the latest ones: near text is the better guess, and a round stays short
LONGEST_MATCH = 32  # tokens that are compared backwards
# A guess behind m tokens in common is taken to come true with (m + 0.5) / (m + 2), and the one behind it with m one
# higher: the chance of a chain falls as a power of its length, not exponentially.
HITS, TRIALS = 0.5, 2.0
LEAST_CHANCE = 0.15  # a node adds about a twelfth to a pass that makes two or three tokens


class LookupDraft:
    """See `RewindableDraft`. It has no engine; its time is the host's."""

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
        matches = self._matches()
        in_common = {position: self._in_common(position) for position in matches}
        level = [(0, 1.0, matches)]  # candidates, their chances, and where in the text their matches stand
        depth, scores = 0, [0.0]
        while level and growth.goes_on(depth, scores):
            parents, children, steps, found = [], [], [], []
            for candidate, chance, positions in level:
                known = [position for position in positions if position < self.known]
                if not known:
                    continue
                matched = depth + max(in_common[position - depth] for position in known)
                again = (matched + HITS) / (matched + TRIALS)
                for token, behind in self._continuations(known)[: growth.width]:
                    share = again * len(behind) / len(known)
                    if chance * share >= LEAST_CHANCE:
                        parents.append(candidate)
                        children.append(token)
                        steps.append(math.log(share))
                        found.append((chance * share, behind))
            if not children:
                break
            first = builder.add_level(parents, children, steps)
            level = [(first + i, *one) for i, one in enumerate(found)]
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

    def _in_common(self, position: int) -> int:
        """How many tokens before `position` are those at the end of the text, as far as that is looked at."""
        text, count = self._text, 0
        while count < min(position, LONGEST_MATCH) and text[position - 1 - count] == text[-1 - count]:
            count += 1
        return count

    def _continuations(self, positions: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(token at some of `positions`, the positions behind those), the most frequent first, of equals the latest."""
        behind = defaultdict(list)
        for position in reversed(positions):
            behind[self._text[position]].append(position + 1)
        return sorted(behind.items(), key=lambda item: len(item[1]), reverse=True)
