"""Which blocks a row takes over from the prefix cache, and which it had better wait for. No jax here."""

import sys

from jaxinfer.page_pool import Digest, PagePool, block_hashes
from jaxinfer.sequence import Sequence


class PrefixSharing:
    """The rows' view of the pool's prefix cache.

    A block enters the cache when a step that wrote all of it has been read, never earlier. Until then a waiting row
    that needs the block is held back: eight equal prompts compute their prefix once.
    """

    def __init__(self, pool: PagePool):
        self._pool = pool
        self._computing: dict[Digest, Sequence] = {}  # blocks of known tokens that running rows are yet to register

    def lookup(self, seq: Sequence) -> list[int] | None:
        """Cached pages the row can begin with; None while a running row computes the block behind them.

        Waiting for it ends: a row in its prompt has all its pages, and running rows come before waiting ones. The
        last token is left out, since computing it gives the first logits.
        """
        if not self._pool.enable_prefix_caching or seq.scores is not None:  # every prompt position must be scored
            return []
        if seq.awaited in self._computing:
            return None
        usable = (len(seq.tokens) - 1) // self._pool.page_size
        hashes = self._hashes(seq)
        shared = self._pool.match(hashes[:usable])
        seq.awaited = hashes[len(shared)] if len(shared) < usable else None
        return None if seq.awaited in self._computing else shared

    def enter(self, seq: Sequence, num_shared: int) -> None:
        """A row starts to run, with `num_shared` pages from the cache."""
        if not self._pool.enable_prefix_caching:
            seq.register_at = sys.maxsize
            return
        seq.registered = num_shared
        seq.register_at = (num_shared + 1) * self._pool.page_size
        for digest in self._hashes(seq)[num_shared:]:
            self._computing.setdefault(digest, seq)

    def register(self, seq: Sequence, num_computed: int) -> None:
        """Makes the full pages of the row's first `num_computed` tokens findable."""
        if num_computed < seq.register_at:
            return
        full = num_computed // self._pool.page_size
        hashes = self._hashes(seq)
        for index in range(seq.registered, full):
            digest = hashes[index]
            self._pool.register(seq.pages[index], digest, watched=seq.watched and seq.seen is None)
            if self._computing.get(digest) is seq:
                del self._computing[digest]
        seq.registered = full
        seq.register_at = (full + 1) * self._pool.page_size

    def leave(self, seq: Sequence) -> None:
        """A row stops running: nobody should wait for it."""
        for digest in seq.hashes[seq.registered:]:
            if self._computing.get(digest) is seq:
                del self._computing[digest]

    def distrust(self, seq: Sequence) -> None:
        """Makes no page of a running row findable any more, also none that it took over: one of them may be why it
        broke.
        """
        self._pool.forget(seq.pages)
        seq.register_at = sys.maxsize

    def clear(self) -> None:
        """No row runs any more."""
        self._computing.clear()

    def check_invariants(self, running: list[Sequence]) -> None:
        """Raises AssertionError when a block is awaited from a row that will not bring it."""
        for digest, seq in self._computing.items():
            if seq not in running or digest not in seq.hashes[seq.registered:]:
                raise AssertionError(f"prefix sharing: {seq.key} does not compute a block that is awaited from it")

    def _hashes(self, seq: Sequence) -> list[Digest]:
        """Hashes of all full blocks of known tokens."""
        roots = (seq.request.tenant, seq.request.cache_salt)
        return block_hashes(seq.tokens, self._pool.page_size, roots, seq.hashes)
