"""Accepting: which part of a drafted tree the target keeps. Pure; the whole of the lossless argument is in these lines.

At every node the target's own next token is drawn from the target's own row, whatever the draft proposed. A drawn
token that happens to be a child was verified in the same pass, so the walk goes on there; the first that is not ends
the round. The draft decides only how far a round gets, never what is emitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dovetail.runtime.errors import DrawError
from dovetail.runtime.trees.tree import Float32s, Tree

Draw = Callable[[Float32s], int]
"""Logits row [V] -> the target's next token. Called once for every emitted token, in the order of the text."""


@dataclasses.dataclass(frozen=True, slots=True)
class Accepted:
    """What a round keeps. `path` starts at the root; `tokens` are the accepted drafted tokens, then the bonus token."""

    path: list[int]  # node numbers, len == accept_length + 1
    tokens: list[int]  # len == accept_length + 1

    @property
    def accept_length(self) -> int:
        """Accepted drafted tokens, the bonus token not counted."""
        return len(self.path) - 1


def accept(
    tree: Tree, logits: Float32s, draw: Draw, limit: int | None = None, ends: frozenset[int] = frozenset()
) -> Accepted:
    """Walk from the root along the target's own draws. `logits` [N, V]: row i is the target's for the token after
    node i.

    At most `limit` tokens are drawn (the caller's room), and none behind one of `ends`, which close a text: plain
    decoding would not draw them either. For the same reason a draw that fails (`DrawError`) counts only at the root,
    where it is raised: behind other tokens the text may be over before it gets there.
    """
    path, tokens, families = [0], [draw(logits[0])], tree.families()
    while len(tokens) != limit and tokens[-1] not in ends:
        child = families[path[-1]].get(tokens[-1])
        if child is None:
            break
        try:
            token = draw(logits[child])
        except DrawError:
            break
        path.append(child)
        tokens.append(token)
    return Accepted(path, tokens)
