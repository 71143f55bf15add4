"""Pages of the key/value cache: a pool of equal blocks, and per sequence a table of those it holds. Plain Python, no
arrays.

A token at slot s of a sequence lives in block `table.blocks[s // block_size]` at offset `s % block_size`
(PagedAttention, Kwon et al. 2023, arXiv 2309.06180, section 4).
"""

from __future__ import annotations

from dovetail.runtime.errors import ContextOverflowError


class BlockPool:
    """Hands out block numbers 0..num_blocks-1; each is held by at most one table at a time."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free blocks. Raises `ContextOverflowError`, taking none, when there are fewer."""
        if count > len(self._free):
            need, have = count * self.block_size, len(self._free) * self.block_size
            raise ContextOverflowError(
                f"expected room in the cache for {need} more tokens, got {have}; close a conversation, or load with a "
                "larger ctx_size or more sequences"
            )
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks got from `take`."""
        self._free.extend(reversed(blocks))
        assert len(self._free) <= self.num_blocks, "a block was given back twice"


class BlockTable:
    """The blocks of one sequence, in order, and how many tokens in them count (`length`)."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.blocks: list[int] = []
        self.length = 0

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens beyond `length`, without counting them yet."""
        needed = -(-(self.length + num_tokens) // self._pool.block_size)
        if needed > len(self.blocks):
            self.blocks += self._pool.take(needed - len(self.blocks))

    def slot(self, index: int) -> tuple[int, int]:
        """Block number and offset of the token at slot `index`."""
        return self.blocks[index // self._pool.block_size], index % self._pool.block_size

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on and give back the blocks that only they used."""
        assert 0 <= length <= self.length
        self.length = length
        kept = -(-length // self._pool.block_size)
        self._pool.give_back(self.blocks[kept:])
        del self.blocks[kept:]

    def release(self) -> None:
        """Give everything back; the table can be used again."""
        self.truncate(0)
