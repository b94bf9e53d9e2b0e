"""Which rows a drafter elsewhere is told of, and which of its proposals still fit. No jax, no gRPC here.

The engine's thread calls it, so nothing here waits but for as long as the device is busy anyway. What the source says
is never believed: a proposal counts only for the row it names, with ids of the vocabulary, and behind tokens that the
row really has. A source that raises is not asked again. Only what a proposal was sampled from is believed, where that
is a distribution, by an engine that trusts its drafter.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxinfer.draft_distributions import Claimed, Distributions, checked, placed
from jaxinfer.sequence import NO_SLOT
from jaxinfer.sequence import Sequence as Row
from jaxinfer.types import Proposed, Request, StepPlan

log = logging.getLogger(__name__)

STEPS_AHEAD = 4
"""Steps whose tokens a proposal may hold: the one in flight when it is made, the one that it is made for, and as many
again, since the next proposal may be late.
"""
LOOK_SECONDS = 0.0005
"""Between two looks at the device while proposals are waited for: a step of a model worth drafting for takes 10 ms."""
TRIED_STEPS, ALL_STEPS = 32, 256
"""Where no proposal fits for so many steps, none is waited for; of all further ones the first so many try again."""


class Proposal(NamedTuple):
    """Tokens that may come at `position` and behind it, in the row that was told under `name`. claimed: what they were
    sampled from.
    """

    name: int
    position: int
    tokens: Sequence[int]
    claimed: Claimed | None = None

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.position + len(self.tokens)


class Terms(NamedTuple):
    """How a row is drafted for. temperature: 0 wants the likeliest tokens, more wants sampled ones and what they were
    sampled from. cache_salt: of its request.
    """

    temperature: float = 0.0
    cache_salt: str = ""


LIKELIEST = Terms()


class ProposalSource(Protocol):
    """Whoever proposes. No call but `wait` waits, and none comes from another thread than the engine's."""

    def tell(self, name: int, position: int, tokens: Sequence[int], terms: Terms = LIKELIEST) -> None:
        """More tokens of a row, the first of them at `position`; 0 begins it. terms: the same each time."""
        ...

    def forget(self, name: int) -> None:
        """The row has ended, or waits again."""
        ...

    def take(self) -> list[Proposal]:
        """What has arrived since the last call, the newest of each row."""
        ...

    def wait(self, seconds: float) -> None:
        """Until something has arrived, at most so long."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it answers at present."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Told:
    """length: tokens of the row that were told. latest: the newest proposal, while it fits. entered: on the device."""

    name: int
    length: int = 0
    latest: Proposal | None = None
    entered: bool = False


def num_ahead(num_drafted: int) -> int:
    """How many proposals of a row are kept (Y): what STEPS_AHEAD steps of one round can use up."""
    return STEPS_AHEAD * (num_drafted + 1)


def salt_of(request: Request) -> str:
    """What the drafter shares the pages of its prefix cache by: the request's salt, apart for each tenant."""
    if not request.tenant:
        return request.cache_salt
    return hashlib.sha256(repr((request.tenant, request.cache_salt)).encode()).hexdigest()


class RemoteDrafts:
    """The rows of one engine, as its source knows them. num_kept: proposals of a row that the device takes.
    num_candidates: ids of the distribution that it takes with each; 0 does not trust the source.
    """

    def __init__(self, source: ProposalSource, vocab_size: int, num_kept: int, num_candidates: int = 0):
        self._source = source
        self._vocab_size = vocab_size
        self._num_kept = num_kept
        self._num_candidates = num_candidates
        self._told: dict[Row, _Told] = {}
        self._next_name = 0
        self._num_plans = 0
        self._useful_at = 0  # the plan that entered a proposal last
        self._broken = False
        self._counts: Counter[str] = Counter()

    def counts(self) -> dict[str, int]:
        """Proposals entered, and those that were not: late (the row had gone past them), wrong (it went elsewhere),
        malformed. Of a source that is trusted, tokens entered with a distribution, and with one that was malformed.
        """
        kinds = ("distributions", "malformed_distributions") if self._num_candidates else ()
        return {kind: self._counts[kind] for kind in ("entered", "late", "wrong", "malformed", *kinds)}

    def tell(self) -> None:
        """What rows have said since they were told of; and that some run no more."""
        self.forget_ended()
        for row, told in self._told.items():
            if len(row.tokens) > told.length:
                self._ask(self._source.tell, told.name, told.length, row.tokens[told.length:], self._terms(row))
                told.length = len(row.tokens)
                if told.latest is not None and self._judge(row, told.latest) != "entered":
                    told.latest = None

    def _terms(self, row: Row) -> Terms:
        """Only rows that are verified by rejection gain by sampled proposals: others keep what is the target's own."""
        params = row.request.params
        sampled = self._num_candidates > 0 and params.seed is None
        return Terms(params.temperature if sampled else 0.0, salt_of(row.request))

    def _begin(self, rows: list[Row]) -> None:
        new = [row for row in rows if row not in self._told]
        for row in new:
            self._told[row] = _Told(self._next_name)
            self._next_name += 1
        if new:
            self.tell()

    def forget_ended(self) -> None:
        """Rows that ended, were cancelled or wait again."""
        for row in [row for row in self._told if row.finished or row.slot == NO_SLOT]:
            self._ask(self._source.forget, self._told.pop(row).name)

    @property
    def is_useful(self) -> bool:
        """Whether proposals fit of late, or it is time to look again whether they do."""
        lately = (self._num_plans - self._useful_at) % ALL_STEPS < TRIED_STEPS
        return lately and not self._broken and self._source.is_alive

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Until every row has a proposal that goes on behind its next token; at most until the device `is_done`."""
        while not is_done():
            self._collect()
            if self._broken or all(told.latest is not None and told.latest.end > told.length + 1
                                   for told in self._told.values()):  # fmt: skip
                return
            self._ask(self._source.wait, LOOK_SECONDS)

    def _collect(self) -> None:
        arrived = self._ask(self._source.take)
        if not arrived:
            return
        rows = {told.name: row for row, told in self._told.items()}
        for one in arrived:
            row, one = rows.get(one.name), self._within(one)
            if row is not None:
                kind = self._judge(row, one)
                if kind == "entered":
                    self._told[row].latest, self._told[row].entered = one, False
                else:
                    self._counts[kind] += 1

    def _within(self, one: Proposal) -> Proposal:
        """Up to the first id that the vocabulary lacks, of a source that is trusted: whether a sampled token is
        proposed must not depend on those behind it, or those that are would not follow their distribution.
        """
        if not self._num_candidates:
            return one
        beyond = (place for place, token in enumerate(one.tokens) if not 0 <= token < self._vocab_size)
        return one._replace(tokens=one.tokens[:next(beyond, len(one.tokens))])

    def with_proposals(self, plan: StepPlan, rows: list[Row]) -> StepPlan:
        """The plan, with what has arrived for its decode rows where it drafts; rows that are new are told of.

        rows: the plan's.
        """
        self._begin(rows)
        self._collect()
        self._num_plans += 1
        if not plan.num_drafted:
            return plan
        found = [entry for row in rows[:plan.num_decode_rows] if (entry := self._entry(row))]
        if found:
            self._useful_at = self._num_plans
        return replace(plan, proposals=tuple(self._with_candidates(found)))

    def _entry(self, row: Row) -> tuple[Proposed, Distributions | None] | None:
        """A new proposal: what lies behind the row's known tokens; and what they were sampled from, as it is claimed.
        """
        told, length = self._told[row], len(row.tokens)
        if told.latest is None or told.entered:
            return None
        told.entered = True
        self._counts["entered"] += 1
        done = length - told.latest.position
        one = Proposed(row.slot, length, tuple(told.latest.tokens[done:done + self._num_kept]))
        if not self._num_candidates:
            return one, None
        return one, placed(told.latest.claimed, done, len(one.tokens), self._num_candidates)

    def _with_candidates(self, found: list[tuple[Proposed, Distributions | None]]) -> list[Proposed]:
        """Those of a source that is trusted, with distributions that are; all are checked at once."""
        told = [distributions for _, distributions in found if distributions is not None]
        if not told:
            return [one for one, _ in found]
        tokens = np.array([token for one, _ in found for token in one.tokens], np.int32)
        together = Distributions(*map(np.concatenate, zip(*told, strict=True)))
        (ids, chances), self_told, malformed = checked(together, tokens, self._vocab_size)
        self._counts.update({"distributions": self_told, "malformed_distributions": malformed})
        ends = np.cumsum([len(one.tokens) for one, _ in found])
        return [one._replace(candidates=(ids[end - len(one.tokens):end], chances[end - len(one.tokens):end]))
                for (one, _), end in zip(found, ends, strict=True)]

    def _judge(self, row: Row, one: Proposal) -> str:
        """What is to become of a proposal: "entered", or the reason against it."""
        done = len(row.tokens) - one.position
        if one.position < 0 or done < 0 or not one.tokens:
            return "malformed"
        if min(one.tokens) < 0 or max(one.tokens) >= self._vocab_size:
            return "malformed"
        if done >= len(one.tokens):
            return "late"
        return "entered" if list(one.tokens[:done]) == row.tokens[one.position:] else "wrong"

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
