"""Which rows a drafter elsewhere is told of, and which of its proposals still fit. No jax, no gRPC here.

The engine's thread calls it, so nothing here waits. What the source says is never believed: a proposal counts only for
the row it names, with ids of the vocabulary, and behind tokens that the row really has. A source that raises is not
asked again.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from jaxinfer.sequence import NO_SLOT
from jaxinfer.sequence import Sequence as Row
from jaxinfer.types import StepPlan

log = logging.getLogger(__name__)

MOST_AHEAD = 64
"""Proposals of a row that are asked for and kept, at most."""
STEPS_AHEAD = 2
"""Steps that may run before a proposal can be used: the one in flight when its tokens are told, and its own."""


class Proposal(NamedTuple):
    """Tokens that may come at `position` and behind it, in the row that was told under `name`."""

    name: int
    position: int
    tokens: Sequence[int]


class ProposalSource(Protocol):
    """Whoever proposes. No call waits, and none comes from another thread than the engine's."""

    def tell(self, name: int, position: int, tokens: Sequence[int]) -> None:
        """More tokens of a row, the first of them at `position`; 0 begins it."""
        ...

    def forget(self, name: int) -> None:
        """The row has ended, or waits again."""
        ...

    def take(self) -> list[Proposal]:
        """What has arrived since the last call, the newest of each row."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Told:
    name: int
    length: int


def num_ahead(num_drafted: int, max_decode_rounds: int) -> int:
    """How many proposals of a row are kept (Y): what STEPS_AHEAD steps can use up, up to MOST_AHEAD."""
    return max(min(STEPS_AHEAD * max_decode_rounds * (num_drafted + 1), MOST_AHEAD), num_drafted + 1)


class RemoteDrafts:
    """The rows of one engine, as its source knows them. num_kept: proposals of a row that the device takes."""

    def __init__(self, source: ProposalSource, vocab_size: int, num_kept: int):
        self._source = source
        self._vocab_size = vocab_size
        self._num_kept = num_kept
        self._told: dict[Row, _Told] = {}
        self._arrived: dict[int, Proposal] = {}
        self._next_name = 0
        self._broken = False
        self._counts: Counter[str] = Counter()

    def counts(self) -> dict[str, int]:
        """Proposals entered, and those that were not: late (the row had gone past them), wrong (it went elsewhere),
        malformed.
        """
        return {kind: self._counts[kind] for kind in ("entered", "late", "wrong", "malformed")}

    def tell(self) -> None:
        """What rows have said since they were told of; and that some run no more."""
        self.forget_ended()
        for row, told in self._told.items():
            if len(row.tokens) > told.length:
                self._ask(self._source.tell, told.name, told.length, row.tokens[told.length:])
                told.length = len(row.tokens)

    def _begin(self, rows: list[Row]) -> None:
        new = [row for row in rows if row not in self._told]
        for row in new:
            self._told[row] = _Told(self._next_name, 0)
            self._next_name += 1
        if new:
            self.tell()

    def forget_ended(self) -> None:
        """Rows that ended, were cancelled or wait again."""
        for row in [row for row in self._told if row.finished or row.slot == NO_SLOT]:
            name = self._told.pop(row).name
            self._arrived.pop(name, None)
            self._ask(self._source.forget, name)

    def with_proposals(self, plan: StepPlan, rows: list[Row]) -> StepPlan:
        """The plan, with what has arrived for its decode rows where it drafts; rows that are new are told of.

        rows: the plan's.
        """
        self._begin(rows)
        names = {told.name for told in self._told.values()}
        for one in self._ask(self._source.take) or ():
            if one.name in names:
                self._arrived[one.name] = one
        if not self._arrived or not plan.num_drafted:
            return plan
        found = (self._entry(row) for row in rows[:plan.num_decode_rows])
        return replace(plan, proposals=tuple(entry for entry in found if entry))

    def _entry(self, row: Row) -> tuple[int, int, tuple[int, ...]] | None:
        told = self._told.get(row)
        one = self._arrived.pop(told.name, None) if told else None
        if one is None:
            return None
        length = len(row.tokens)
        kind, tokens = self._fitting(row, one)
        self._counts[kind] += 1
        return (row.slot, length, tokens) if tokens else None

    def _fitting(self, row: Row, one: Proposal) -> tuple[str, tuple[int, ...]]:
        """The part of a proposal that lies behind the row's tokens, and what became of the whole."""
        done = len(row.tokens) - one.position
        if one.position < 0 or done < 0 or not one.tokens:
            return "malformed", ()
        if min(one.tokens) < 0 or max(one.tokens) >= self._vocab_size:
            return "malformed", ()
        if done >= len(one.tokens):
            return "late", ()
        if list(one.tokens[:done]) != row.tokens[one.position:]:
            return "wrong", ()
        return "entered", tuple(one.tokens[done:done + self._num_kept])

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        if self._broken:
            return None
        try:
            return call(*args)
        except Exception:
            log.exception("the source of proposals failed; from now on nothing is drafted")
            self._broken = True
            return None

    def close(self) -> None:
        self._source.close()
