"""Pages of the key/value cache: a pool of equal pages, and per sequence a table of those it holds. Plain Python, no
arrays.

A token at slot s of a sequence lies in page `table.pages[s // page_size]` at offset `s % page_size` (PagedAttention,
Kwon et al. 2023, arXiv 2309.06180, section 4). A page may belong to several sequences that begin alike: it is counted
how many hold it, and who wants to write into a shared one gets a copy of it first.
"""

from __future__ import annotations

import dataclasses

from dovetail.runtime.errors import CacheFullError


class PagePool:
    """Hands out page numbers from 0 to `num_pages - 1` and counts who holds them."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 0
        assert page_size > 0
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages. Raises `CacheFullError`, taking none, when there are fewer."""
        if count > len(self._free):
            raise CacheFullError(
                f"expected {count * self.page_size} free tokens in the cache, got {len(self._free) * self.page_size}"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """Another table holds these pages, too."""
        for page in pages:
            assert self._holders[page] > 0, "a page that nobody holds"
            self._holders[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether more than one table holds it."""
        return self._holders[page] > 1

    def give_back(self, pages: list[int]) -> None:
        """A table holds these pages no longer."""
        for page in reversed(pages):
            assert self._holders[page] > 0, "a page was given back twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)


@dataclasses.dataclass(frozen=True, slots=True)
class PageCopy:
    """The first `slots` of page `source` are to be copied to page `target`."""

    source: int
    target: int
    slots: int


class PageTable:
    """The pages of one sequence, in order, and how many tokens in them count (`length`)."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.pages: list[int] = []
        self.length = 0

    def reserve(self, num_tokens: int) -> PageCopy | None:
        """Make room for `num_tokens` tokens beyond `length`, without counting them yet.

        Returns what the caller must copy before it writes: the page that `length` lies in, where it was shared.
        Raises `CacheFullError`, changing nothing.
        """
        size = self._pool.page_size
        first, slots = divmod(self.length, size)
        shared = [i for i in range(first, len(self.pages)) if self._pool.is_shared(self.pages[i])]
        lacking = max(-(-(self.length + num_tokens) // size) - len(self.pages), 0)
        new = self._pool.take(len(shared) + lacking)
        copy = None
        for i in shared:
            page, own = self.pages[i], new.pop()
            if i == first and slots:
                copy = PageCopy(page, own, slots)
            self._pool.give_back([page])
            self.pages[i] = own
        self.pages += new
        return copy

    def slot(self, index: int) -> tuple[int, int]:
        """Page number and offset of the token at slot `index`."""
        return self.pages[index // self._pool.page_size], index % self._pool.page_size

    def fork(self) -> PageTable:
        """A table that shares the pages of all tokens that count."""
        table = PageTable(self._pool)
        table.length = self.length
        table.pages = self.pages[: -(-self.length // self._pool.page_size)]
        self._pool.share(table.pages)
        return table

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on and give back the pages that only they used."""
        assert 0 <= length <= self.length
        self.length = length
        pages = -(-length // self._pool.page_size)
        self._pool.give_back(self.pages[pages:])
        del self.pages[pages:]
