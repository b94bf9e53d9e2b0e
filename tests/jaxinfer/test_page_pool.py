"""Pages: allocation, references, prefix blocks, eviction order."""

import hashlib
import struct

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxinfer.page_pool import PagePool, block_hashes

A, B, C, D = (bytes([number]) * 32 for number in range(4))


def cached(pool: PagePool, *digests: bytes) -> list[int]:
    """Pages that were computed, registered and given back, in one table."""
    pages = pool.allocate(len(digests))
    assert pages is not None
    for page, digest in zip(pages, digests, strict=True):
        pool.register(page, digest)
    pool.release(pages)
    return pages


def test_allocates_lowest_pages_first():
    assert PagePool(4, 16).allocate(3) == [0, 1, 2]


def test_allocates_all_or_nothing():
    pool = PagePool(4, 16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    assert pool.allocate(0) == []


def test_released_pages_without_hash_are_free_again():
    pool = PagePool(2, 16)
    pages = pool.allocate(2) or []
    pool.release(pages)
    assert (pool.num_free, pool.num_idle, pool.num_held) == (2, 0, 0)
    pool.check_invariants([])


def test_a_shared_page_is_held_until_its_last_release():
    pool = PagePool(2, 16)
    pages = pool.allocate(1) or []
    pool.acquire(pages)
    pool.release(pages)
    assert pool.num_held == 1
    pool.release(pages)
    assert pool.num_held == 0


def test_matches_the_longest_known_run():
    pool = PagePool(4, 16)
    pages = cached(pool, A, B, C)
    assert pool.match([A, B, D, C]) == pages[:2]
    assert pool.match([D, A]) == []


def test_an_idle_page_comes_back_to_life():
    pool = PagePool(2, 16)
    pages = cached(pool, A)
    assert (pool.num_idle, pool.num_free) == (1, 2)
    pool.acquire(pool.match([A]))
    assert (pool.num_idle, pool.num_held) == (0, 1)
    pool.check_invariants([pages])


def test_cost_counts_idle_pages_but_not_held_ones():
    pool = PagePool(4, 16)
    held = pool.allocate(1) or []
    pool.register(held[0], A)
    idle = cached(pool, B)
    assert pool.cost(held + idle, 2) == 3


def test_free_pages_go_before_cached_ones():
    pool = PagePool(3, 16)
    pages = cached(pool, A)
    pool.allocate(2)
    assert pool.match([A]) == pages


def test_eviction_takes_the_least_recently_released_first():
    pool = PagePool(2, 16)
    cached(pool, A), cached(pool, B)
    pool.allocate(1)
    assert pool.match([A]) == [] and len(pool.match([B])) == 1


def test_use_makes_a_page_recent():
    pool = PagePool(2, 16)
    cached(pool, A), cached(pool, B)
    again = pool.match([A])
    pool.acquire(again)
    pool.release(again)
    pool.allocate(1)
    assert pool.match([B]) == [] and len(pool.match([A])) == 1


def test_the_tail_of_a_table_is_evicted_before_its_head():
    pool = PagePool(3, 16)
    pages = cached(pool, A, B, C)
    pool.allocate(1)
    assert pool.match([A, B, C]) == pages[:2]


def test_an_evicted_block_is_not_found():
    pool = PagePool(1, 16)
    cached(pool, A)
    pages = pool.allocate(1) or []
    assert pool.match([A]) == []
    pool.register(pages[0], A)
    assert pool.match([A]) == pages


def test_the_first_registration_of_a_block_wins():
    pool = PagePool(4, 16)
    first, second = pool.allocate(2) or []
    pool.register(first, A)
    pool.register(second, A)
    assert pool.match([A]) == [first]
    pool.release([second])
    assert pool.num_idle == 0
    pool.check_invariants([[first]])


def test_a_page_keeps_its_first_hash():
    pool = PagePool(2, 16)
    pages = pool.allocate(1) or []
    pool.register(pages[0], A)
    pool.register(pages[0], B)
    assert (pool.match([A]), pool.match([B])) == (pages, [])


def test_only_held_pages_can_be_registered():
    with pytest.raises(ValueError, match="not held"):
        PagePool(2, 16).register(0, A)


def test_reset_forgets_everything():
    pool = PagePool(2, 16)
    cached(pool, A)
    pool.allocate(1)
    pool.reset()
    assert (pool.num_free, pool.num_idle, pool.match([A])) == (2, 0, [])
    pool.check_invariants([])


@pytest.mark.parametrize("tables", [[], [[0, 1], [1]], [[0]], [[0, 1, 1]], [[0, 1, 2]], [[0, 1, 7]]])
def test_invariants_notice_tables_that_disagree(tables: list[list[int]]):
    pool = PagePool(4, 16)
    pool.allocate(2)
    pool.check_invariants([[0, 1]])
    with pytest.raises(AssertionError, match="page pool"):
        pool.check_invariants(tables)


def test_a_page_that_is_held_or_lost_at_rest_shows():
    pool = PagePool(4, 16)
    cached(pool, A)
    assert pool.rest_problem() is None
    held = pool.allocate(1) or []
    assert pool.rest_problem() == "2 free, 1 cached and 1 held pages of 4, but nothing may be held"
    pool.release(held)
    pool._free.pop()
    assert pool.rest_problem() == "2 free, 1 cached and 0 held pages of 4, but nothing may be held"


def test_only_full_blocks_are_hashed():
    assert [len(block_hashes(range(count), 4)) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_hash_covers_all_tokens_before_it():
    one, other = block_hashes([1, 2, 3, 4], 2), block_hashes([9, 2, 3, 4], 2)
    assert one[0] != other[0] and one[1] != other[1]
    assert block_hashes([1, 2, 3, 9], 2)[0] == one[0]


def test_hashing_can_be_continued():
    tokens = list(range(100, 111))
    known = block_hashes(tokens[:5], 2)
    assert block_hashes(tokens, 2, known=known) is known
    assert known == block_hashes(tokens, 2)


@pytest.mark.parametrize("keys", [("tenant",), ("a", "b"), ("ab",), ("", "ab"), ('a", "b',)])
def test_extra_keys_separate_every_block(keys: tuple[str, ...]):
    others = [(), ("tenant",), ("a", "b"), ("ab",), ("", "ab"), ('a", "b',)]
    found = [other for other in others if set(block_hashes(range(6), 2, other)) & set(block_hashes(range(6), 2, keys))]
    assert found == [keys]


def test_a_hash_is_sha256_of_the_parent_and_the_tokens():
    root = hashlib.sha256(b"('salt',)").digest()
    first = hashlib.sha256(root + struct.pack("=2i", 1, 2)).digest()
    second = hashlib.sha256(first + struct.pack("=2i", 3, 4)).digest()
    assert block_hashes([1, 2, 3, 4], 2, ("salt",)) == [first, second]


def test_a_page_of_a_known_block_is_as_watched_as_it_was_registered():
    pool = PagePool(4, 16)
    first, second = pool.allocate(2) or []
    pool.register(first, A, watched=False)
    pool.register(second, A, watched=False)
    assert (pool.num_watched([first]), pool.num_watched([second])) == (0, 0)
    pool.watch([second])
    assert (pool.num_watched([first]), pool.num_watched([second, first])) == (0, 1)


class PoolMachine(RuleBasedStateMachine):
    """Random use, against books kept the slow way: a list of idle blocks in the order of their last release."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(6, 16)
        self.tables: list[list[int]] = []
        self.block_of: dict[int, bytes] = {}
        self.idle: list[int] = []
        self.watched: dict[int, bool] = {}

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int):
        free = self.pool.num_pages - len({page for table in self.tables for page in table}) - len(self.idle)
        pages = self.pool.allocate(count)
        assert (pages is None) == (count > free + len(self.idle))
        if pages:
            evicted, self.idle = self.idle[:max(0, count - free)], self.idle[max(0, count - free):]
            assert set(evicted) <= set(pages) and not set(self.idle) & set(pages)
            for page in evicted:
                del self.block_of[page]
            self.tables.append(pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        held = {page for other in self.tables for page in other}
        self.idle += [page for page in reversed(table) if page not in held and page in self.block_of]

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), block=st.integers(0, 5), watched=st.booleans())
    def register(self, data: st.DataObject, block: int, watched: bool):
        page = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        self.pool.register(page, bytes([block]), watched=watched)
        if page not in self.block_of and bytes([block]) not in self.block_of.values():
            self.block_of[page] = bytes([block])
            self.watched[page] = watched

    @rule(blocks=st.lists(st.integers(0, 5), unique=True), watch=st.booleans())
    def ask_what_is_watched(self, blocks: list[int], watch: bool):
        """Of registered pages, which keep it until they are somebody else's."""
        pages = self.pool.match(bytes([block]) for block in blocks)
        known = [self.watched[page] for page in pages]
        assert self.pool.num_watched(pages) == (known.index(False) if False in known else len(known))
        if watch:
            self.pool.watch(pages)
            self.watched.update(dict.fromkeys(pages, True))

    @rule(blocks=st.lists(st.integers(0, 5), unique=True))
    def share(self, blocks: list[int]):
        pages = self.pool.match(bytes([block]) for block in blocks)
        assert [self.block_of[page] for page in pages] == [bytes([block]) for block in blocks[:len(pages)]]
        assert len(pages) == len(blocks) or bytes([blocks[len(pages)]]) not in self.block_of.values()
        before = self.pool.num_free
        cost = self.pool.cost(pages, 0)
        self.pool.acquire(pages)
        assert before - self.pool.num_free == cost
        self.idle = [page for page in self.idle if page not in pages]
        if pages:
            self.tables.append(pages)

    @invariant()
    def books_agree(self):
        self.pool.check_invariants(self.tables)
        assert self.pool.num_idle == len(self.idle)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40)
