"""What a target has verified of a text, as its drafts are told of it: the one place where tokens meet features.

A draft reads pairs (EAGLE, Li et al. 2024, arXiv 2401.15077, section 4.1): the target's feature of position p together
with the token of position p + 1, from which it guesses position p + 2. The last token of a text is in no cache yet and
has no feature: it is the token of the newest pair.

    position       0    1    2    3    4
    token          a    b    c    d    e        e was drawn last
    feature        A    B    C    D             the target's cache holds a to d
    pairs          Ab   Bc   Cd   De

Letters: m pairs, D feature size.
"""

from __future__ import annotations

import dataclasses

from dovetail.runtime.trees.tree import Float32s, Int64s


@dataclasses.dataclass(frozen=True, slots=True)
class Verified:
    """Features of the positions from `begin` on, and the tokens there and one further.

    In the drawing, what is verified from position 2 on is `Verified(2, [c, d, e], [C, D])`.
    """

    begin: int
    tokens: Int64s  # [m + 1] of positions begin .. begin + m
    features: Float32s  # [m, D] of positions begin .. begin + m - 1

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.features) + 1, "one token more than features"

    @property
    def end(self) -> int:
        """The first position that is not verified: of the last token."""
        return self.begin + len(self.features)

    @property
    def following(self) -> Int64s:
        """[m] the token of each feature's pair."""
        return self.tokens[1:]

    def since(self, position: int) -> Verified:
        """What of it lies at `position` and behind."""
        cut = min(max(position - self.begin, 0), len(self.features))
        return Verified(self.begin + cut, self.tokens[cut:], self.features[cut:])
