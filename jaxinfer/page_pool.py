"""Pages of the KV cache: who holds them, and which finished blocks of tokens they still contain. No jax here.

A page is in exactly one of three states:

    free    no content worth keeping
    idle    nobody holds it, but its block of tokens can be found again by hash; evicted least recently used first
    held    in the page tables of `refs` sequences

A block is one full page of tokens. Its hash covers everything before it (a sha256 chain), so equal hashes mean equal
contexts, and tenants are kept apart by the salt at the root of the chain. Page tables are append-only: when two
sequences compute the same block at once both keep their own page and the first registered one is found later.

A page of which a draft model has not computed its half is not `watched`.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile

Digest = bytes


class PagePool:
    """Reference-counted pages 0..num_pages-1 of page_size tokens, with a prefix cache over full pages."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True):
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.reset()

    def reset(self) -> None:
        """Forgets every page and block, as after the device's pages were lost."""
        self._refs = [0] * self.num_pages
        self._digests: list[Digest | None] = [None] * self.num_pages
        self._watched = [True] * self.num_pages  # of those that were registered
        self._page_of: dict[Digest, int] = {}
        self._free = list(range(self.num_pages - 1, -1, -1))  # a stack, lowest page on top
        self._idle: OrderedDict[int, Digest] = OrderedDict()  # least recently used first
        self._num_held = 0  # counted by itself, not what the others leave: so a page that is lost shows

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages nobody holds whose block can still be found."""
        return len(self._idle)

    @property
    def num_blank(self) -> int:
        """Pages that are free and hold no block."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Pages in at least one page table."""
        return self._num_held

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None (and no change) when there are not as many."""
        if count > self.num_free:
            return None
        pages = [self._take() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        self._num_held += count
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference of each page of a table. The tail goes first, so that it is evicted before the head."""
        refs = self._refs
        for page in reversed(pages):
            refs[page] -= 1
            if refs[page] == 0:
                self._num_held -= 1
                digest = self._digests[page]
                if digest is None:
                    self._free.append(page)
                else:
                    self._idle[page] = digest

    def match(self, digests: Iterable[Digest]) -> list[int]:
        """Pages of the longest known run of blocks. Takes no reference: call `acquire` before anything is allocated."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def acquire(self, pages: Iterable[int]) -> None:
        """One more reference to each matched page; idle ones come back to life."""
        for page in pages:
            if self._refs[page] == 0:
                del self._idle[page]
                self._num_held += 1
            self._refs[page] += 1

    def cost(self, shared: Iterable[int], count: int) -> int:
        """How much `num_free` falls by acquiring `shared` and allocating `count` more."""
        return count + sum(self._refs[page] == 0 for page in shared)

    def register(self, page: int, digest: Digest, *, watched: bool = True) -> None:
        """Makes a held, fully written page findable. If the block is known already, the first page stays the one."""
        if self._refs[page] == 0:
            raise ValueError(f"page {page} is not held: only the holder may register it")
        if self._digests[page] is not None:
            return
        self._watched[page] = watched
        if digest not in self._page_of:
            self._digests[page] = digest
            self._page_of[digest] = page

    def forget(self, pages: Iterable[int]) -> None:
        """Makes held pages findable no more: their content is not to be trusted."""
        for page in pages:
            digest, self._digests[page] = self._digests[page], None
            if digest is not None:
                del self._page_of[digest]

    def num_watched(self, pages: Iterable[int]) -> int:
        """How many of these registered pages are watched, up to the first that is not."""
        return sum(1 for _ in takewhile(self._watched.__getitem__, pages))

    def watch(self, pages: Iterable[int]) -> None:
        """A draft model computes its half of these registered pages."""
        for page in pages:
            self._watched[page] = True

    def rest_problem(self) -> str | None:
        """What is wrong if no sequence holds anything; None if every page is given back. Costs nothing."""
        blank, idle, held = self.num_blank, self.num_idle, self.num_held
        if not held and blank + idle == self.num_pages:
            return None
        return f"{blank} free, {idle} cached and {held} held pages of {self.num_pages}, but nothing may be held"

    def check_invariants(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the books agree with `tables`, the page tables of all holders."""
        uses = Counter(page for table in tables for page in table)
        for page, refs in enumerate(self._refs):
            _require(refs == uses[page], f"page {page} has {refs} references but is in {uses[page]} tables")
        _require(sum(uses.values()) >= len(uses) and all(0 <= page < self.num_pages for page in uses),
                 "a table names a page outside the pool")
        free, idle, held = set(self._free), set(self._idle), set(uses)
        _require(len(free) == len(self._free), "a page is free twice")
        _require(not (free & idle or free & held or idle & held), "a page is in two states")
        _require(len(free) + len(idle) + len(held) == self.num_pages, "free + idle + held pages are not the total")
        _require(len(held) == self._num_held, "held pages are miscounted")
        _require(all(self._digests[page] is None for page in free), "a free page still has a hash")
        _require(all(self._digests[page] is not None for page in idle), "an idle page has no hash")
        known = {digest: page for page, digest in enumerate(self._digests) if digest is not None}
        _require(known == self._page_of, "hashes of pages and pages of hashes differ")

    def _take(self) -> int:
        """A page without content: a free one, else the least recently used idle one, which is forgotten."""
        if self._free:
            return self._free.pop()
        page, digest = self._idle.popitem(last=False)
        del self._page_of[digest]
        self._digests[page] = None
        return page


def block_hashes(tokens: Sequence[int], page_size: int, extra_keys: tuple[str, ...] = (),
                 known: list[Digest] | None = None) -> list[Digest]:
    """Hashes of all full blocks of `tokens`; `known`, the hashes of the first of them, is extended in place.

    extra_keys: what besides the tokens decides the content: tenant salt, adapter, model revision. They sit at the root.
    """
    hashes = [] if known is None else known
    done = len(hashes) * page_size
    if done + page_size > len(tokens):
        return hashes
    sha256 = hashlib.sha256
    parent = hashes[-1] if hashes else sha256(repr(extra_keys).encode()).digest()
    numbers = array("i", tokens[done:])
    data, width = numbers.tobytes(), numbers.itemsize * page_size
    for start in range(0, len(data) - width + 1, width):
        parent = sha256(parent + data[start:start + width]).digest()
        hashes.append(parent)
    return hashes


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"page pool: {message}")
