"""Prompt lookup: no model, the text itself is the draft. What followed the last few tokens before may follow again.

Prompt lookup decoding (Saxena 2023) takes one match, and so many tokens behind it. Here the latest matches of the
longest n-gram make one tree, weighted by how many of them go on alike and by how far back they match: two tokens in
common may be chance, thirty are a copy. What is too unlikely to earn its place in the target's pass is not offered.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from dovetail.runtime.drafts.base import Foresight, Grown, TreeGrowth, blind
from dovetail.runtime.policies.base import TreeBudget
from dovetail.runtime.trees.tree import CandidateTree
from dovetail.runtime.trees.verified import Verified

NGRAMS = (4, 3, 2)  # tokens that must match; the longest that does is taken
MAX_MATCHES = 16  # the latest ones: near text is the better guess, and a round stays short
LONGEST_MATCH = 32  # tokens that are compared backwards
# A guess behind m tokens in common is taken to come true with (m + 0.5) / (m + 2), and the one behind it with m one
# higher: the chance of a chain falls as a power of its length, not exponentially.
HITS, TRIALS = 0.5, 2.0
LEAST_CHANCE = 0.15  # a node adds about a twelfth to a pass that makes two or three tokens


class LookupDraft:
    """See `Draft`. It asks no graph."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram -> positions behind its occurrences, ascending

    @property
    def known(self) -> int:
        """See `Draft`. The text is one token longer: the last one follows the newest pair."""
        return max(len(self._text) - 1, 0)

    def tell(self, verified: Verified) -> None:
        """See `Draft`. The features are not looked at."""
        assert verified.begin <= self.known, "matches need the whole text"
        for token in verified.tokens[len(self._text) - verified.begin :].tolist():
            self._append(token)

    def truncate(self, known: int) -> None:
        """See `Draft`."""
        assert 0 <= known <= self.known
        length = known + 1 if known else 0
        for end in range(len(self._text), length, -1):
            for gram in self._grams(end):
                self._ends[gram].pop()
        del self._text[length:]

    def close(self) -> None:
        """See `Draft`."""
        self._text.clear()
        self._ends.clear()

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> TreeGrowth:
        """See `Draft`. Candidates' scores are logarithms of the chances that they are given here."""
        candidates = CandidateTree(root)
        matches = self._matches()
        in_common = {position: self._in_common(position) for position in matches}
        level = [(0, 1.0, matches)]  # candidates, their chances, and where in the text their matches stand
        length = len(self._text)
        while level and budget.wants_level(candidates.levels):
            depth = candidates.depth
            parents, children, steps, next_level = [], [], [], []
            for candidate, chance, positions in level:
                within = [position for position in positions if position < length]
                if not within:
                    continue
                matched = depth + max(in_common[position - depth] for position in within)
                again = (matched + HITS) / (matched + TRIALS)
                for token, behind in self._continuations(within)[: budget.width]:
                    share = again * len(behind) / len(within)
                    if chance * share >= LEAST_CHANCE:
                        parents.append(candidate)
                        children.append(token)
                        steps.append(math.log(share))
                        next_level.append((chance * share, behind))
            if not children:
                break
            first = candidates.add_level(parents, children, steps)
            level = [(first + i, *one) for i, one in enumerate(next_level)]
        return Grown(candidates)

    def _append(self, token: int) -> None:
        self._text.append(token)
        for gram in self._grams(len(self._text)):
            self._ends.setdefault(gram, []).append(len(self._text))

    def _grams(self, end: int) -> Iterator[tuple[int, ...]]:
        return (tuple(self._text[end - size : end]) for size in NGRAMS if size <= end)

    def _matches(self) -> list[int]:
        """Positions behind earlier occurrences of the text's last n-gram, the longest that occurred."""
        for gram in self._grams(len(self._text)):
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
