"""The scheduler's books, and what must hold between them after every step. No jax here."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from jaxinfer.sequence import NO_SLOT, Sequence


@dataclass(frozen=True, slots=True)
class Books:
    """running, waiting: sorted by key. requests: their unfinished samples. in_flight: rows by step. speculates: rounds
    may bring several tokens.
    """

    running: list[Sequence]
    waiting: list[Sequence]
    requests: Mapping[str, list[Sequence]]
    in_flight: Mapping[int, list[Sequence]]
    free_slots: list[int]
    max_num_seqs: int
    num_prefilling: int
    num_constrained: int
    speculates: bool

    def check(self) -> None:
        """Raises AssertionError where they do not agree."""
        for rows in (self.running, self.waiting):
            require(all(one.key < after.key for one, after in pairwise(rows)), "a queue is out of order")
        live = {seq for rows in self.requests.values() for seq in rows}
        require(live == {*self.running, *self.waiting}, "queues and requests differ")
        require(len(live) == len(self.running) + len(self.waiting), "a sequence is in two queues")
        slots = [seq.slot for seq in self.running] + self.free_slots
        require(sorted(slots) == list(range(self.max_num_seqs)), "slots are lost or shared")
        self._check_counts()
        for seq in self.running:
            check_running(seq, self._flies(seq))
            if self.speculates and seq.decoding:
                check_bounds(seq)
        for seq in self.waiting:
            require(seq.slot == NO_SLOT and not seq.pages and not seq.planned, "a waiting row holds something")

    def _check_counts(self) -> None:
        prefilling = sum(not seq.decoding for seq in self.running)
        constrained = sum(seq.matcher is not None for seq in self.running)
        require(self.num_prefilling == prefilling, "prefilling rows miscounted")
        require(self.num_constrained == constrained, "rows with a grammar miscounted")

    def _flies(self, seq: Sequence) -> bool:
        return any(seq in rows for rows in self.in_flight.values())


def check_running(seq: Sequence, is_in_flight: bool) -> None:
    """Raises AssertionError unless the counters of a running row agree."""
    known = len(seq.tokens)
    require(known <= seq.end, "a row that has all its tokens still runs")
    require(seq.planned <= seq.capacity, "tokens are planned without pages for them")
    if seq.decoding:
        require(known - 1 <= seq.planned <= seq.end, "a decode row is planned behind its tokens or beyond its end")
        require(is_in_flight or seq.planned == known - 1, "planned tokens are not in flight")
    else:
        require(seq.planned < known, "a row with its whole prompt planned does not decode")


def check_bounds(seq: Sequence) -> None:
    """Raises AssertionError unless what a decode row has at least and at most follows from its steps in flight."""
    bounds = [len(seq.tokens) - 1 + sum(flight) for flight in zip((0, 0), *seq.flights, strict=True)]
    require([seq.certain, seq.planned] == [min(bound, seq.end) for bound in bounds],
            "a row's bounds are not those of its steps in flight")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"scheduler: {message}")
