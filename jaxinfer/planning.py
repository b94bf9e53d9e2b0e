"""A plan while it is made, and what planning does to its decode rows. No jax here."""

from collections.abc import Collection, Iterable
from itertools import accumulate

from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.page_pool import PagePool
from jaxinfer.sequence import Sequence
from jaxinfer.types import CaughtUp, RowInit, SamplerForm, StepKind, StepPlan

ON_DEVICE: tuple[int, ...] = ()
"""Stands for the one token of a decode row."""


class Planning:
    """Decode rows, then chunks as (sequence, first position, end position). single: rounds are not fused."""

    def __init__(self, budget: int, single: bool = False):
        self.budget = budget
        self.single = single
        self.rounds = 1
        self.drafts = False
        self.decodes: list[Sequence] = []
        self.chunks: list[tuple[Sequence, int, int]] = []
        self.init_rows: list[RowInit] = []
        self.new_pages: list[tuple[int, int, tuple[int, ...]]] = []
        self.caught_up: list[CaughtUp] = []
        self.lacked_pages = False

    def most_tokens(self, seq: Sequence) -> int:
        """That a decode row gets."""
        return self.rounds * (1 + seq.num_drafted) if self.drafts else self.rounds

    @property
    def rows(self) -> list[Sequence]:
        """In the order of the step, once chunks are sorted."""
        return [*self.decodes, *(seq for seq, _, _ in self.chunks)]

    def sort_chunks(self) -> None:
        """Those of one token come before longer ones, behind the decode rows."""
        self.chunks.sort(key=lambda chunk: chunk[2] - chunk[1] > 1)

    @property
    def watched(self) -> bool:
        """Whether a drafter to which prompts are work sees the step."""
        if not self.chunks:
            return self.drafts
        return any(seq.watched for seq, _, _ in self.chunks) or any(seq.num_drafted for seq in self.decodes)

    @property
    def is_least(self) -> bool:
        """Whether no decode row could get less."""
        return self.rounds == 1 and not self.drafts


def advance(rows: list[Sequence], rounds: int) -> tuple[list[int], list[int], SamplerForm]:
    """Plans `rounds` tokens for decode rows; their slots, their positions before and the sampler they need."""
    slots = [seq.slot for seq in rows]
    starts = [seq.planned for seq in rows]
    sampler = SamplerForm.GREEDY
    for seq, start in zip(rows, starts, strict=True):
        if start < seq.full_below:
            sampler = SamplerForm.FULL
        elif seq.form > sampler:
            sampler = seq.form
        stop = start + rounds
        seq.planned = stop if stop < seq.end else seq.end  # the hottest line of a plan: no call of min()
    return slots, starts, sampler


def advance_speculating(plan: Planning, rounds: int, drafts: bool) -> tuple[list[int], list[int], SamplerForm]:
    """`advance` where a round brings up to `Sequence.num_drafted` tokens more."""
    rows, watched = plan.decodes, plan.watched
    slots = [seq.slot for seq in rows]
    starts = [seq.planned for seq in rows]
    sampler = sampler_of(rows)
    for seq in rows:
        sees = watched and (seq.num_drafted > 0 or not drafts)  # beside rows that draft, rounds may end up plain
        if seq.watched and not sees and seq.seen is None:
            seq.seen = max(seq.certain - 1, 0)  # a draft model may lack the last
        seq.take_off(rounds, rounds * (1 + seq.num_drafted) if drafts else rounds)
    return slots, starts, sampler


def sampler_of(rows: list[Sequence]) -> SamplerForm:
    """The smallest sampler that covers decode rows that speculate."""
    sampler = SamplerForm.GREEDY
    for seq in rows:
        if seq.certain < seq.full_below:
            return SamplerForm.FULL
        if seq.form > sampler:
            sampler = seq.form
    return sampler


def to_decode(running: list[Sequence], *, speculating: bool) -> list[Sequence]:
    """The rows that are past their prompts, and may have tokens left behind the steps in flight."""
    if speculating:
        return [seq for seq in running if seq.decoding and seq.certain < seq.end]
    return [seq for seq in running if seq.decoding and seq.planned < seq.end]


def choose_lengths(plan: Planning, rows: list[Sequence], late: list[Sequence], ready: Collection[Sequence],
                   drafts: DraftLengths) -> None:  # fmt: skip
    """How much is drafted for each row. late: those that the drafter is to catch up with. ready: of them those that it
    will have seen by then.
    """
    drafts.choose(rows, plan.rounds, sampler_of(rows), ready)
    plan.drafts = any(seq.num_drafted for seq in rows)
    if late:  # once they are ready, they are worth proposals
        drafts.wake()


def asked(drafts: DraftLengths | None, rows: list[Sequence], *, prefilling: bool) -> DraftLengths | None:
    """Who says how much is drafted in a step of these rows; None where nothing is: beside prompts, and as before."""
    if drafts is None or prefilling or drafts.rests(sampler_of(rows), len(rows)):
        return None
    return drafts


def most_left(rows: list[Sequence], *, speculating: bool) -> int:
    """Tokens that a row may still have to compute, at most."""
    return max(seq.end - (seq.certain if speculating else seq.planned) for seq in rows)


def short_of_pages(plan: Planning, rows: list[Sequence]) -> list[Sequence]:
    """Those of `rows` whose pages do not hold the tokens that the plan gives them."""
    if plan.is_least:
        return [seq for seq in rows if seq.planned >= seq.capacity and seq.planned < seq.end]
    return [seq for seq in rows if min(seq.planned + plan.most_tokens(seq), seq.end) > seq.capacity]


def num_missing(plan: Planning, short: Iterable[Sequence], page_size: int) -> int:
    """Pages that rows which are short of pages need for those tokens."""
    return sum(-(-min(seq.planned + plan.most_tokens(seq), seq.end) // page_size) - len(seq.pages) for seq in short)


def num_watched(seq: Sequence, pool: PagePool) -> int:
    """The row's first tokens whose pages are registered and have a draft model's half."""
    return pool.num_watched(seq.pages[:seq.registered]) * pool.page_size


def ready_of(late: list[Sequence], budget: int) -> set[Sequence]:
    """Of rows that a drafter has to catch up with, those that it can now, at most so many tokens or one row.

    What is in flight the host cannot tell it, and a draft model computes the last two tokens of a row itself.
    """
    ready = [seq for seq in late if seq.num_in_flight <= 1]
    totals = accumulate(len(seq.tokens) for seq in ready)
    return {seq for index, (seq, total) in enumerate(zip(ready, totals, strict=True)) if total <= budget or not index}


def catch_up(plan: Planning, seq: Sequence, count: int, pool: PagePool) -> None:
    """Has the drafter told of the row's first `count` tokens, if it is to draft for the row."""
    if seq.watched and count:
        first = max(num_watched(seq, pool), seq.seen or 0)
        plan.caught_up.append(CaughtUp(seq.slot, first, tuple(seq.tokens[:count]), tuple(seq.pages)))
        pool.watch(seq.pages[:seq.registered])
        seq.seen = None


def decode_plan(plan: Planning, step_id: int, decodes: tuple[list[int], list[int], SamplerForm], *, constrained: bool
                ) -> StepPlan:
    """As `prefill_plan`."""
    (slots, starts, sampler), count = decodes, len(plan.decodes)
    drafted = tuple(seq.num_drafted for seq in plan.decodes) if plan.drafts else ()
    return StepPlan(step_id, StepKind.DECODE, plan.rounds, sampler, tuple(slots), (ON_DEVICE,) * count, tuple(starts),
                    (True,) * count, (), tuple(plan.new_pages), num_drafted=drafted, constrained=constrained,
                    caught_up=tuple(plan.caught_up))


def prefill_plan(plan: Planning, step_id: int, decodes: tuple[list[int], list[int], SamplerForm], *, constrained: bool
                 ) -> StepPlan:
    """Of sorted chunks. decodes: what `advance` says of the decode rows. constrained: whether a running row has a
    grammar.
    """
    slots, starts, sampler = decodes
    tokens, following = [ON_DEVICE] * len(slots), [-1] * len(slots)
    samples = [True] * len(slots)
    for seq, start, stop in plan.chunks:
        slots.append(seq.slot)
        starts.append(start)
        tokens.append(tuple(seq.tokens[start:stop]))
        samples.append(seq.decoding)
        following.append(seq.tokens[stop] if stop < seq.num_prompt else -1)
        if seq.decoding:
            sampler = max(sampler, SamplerForm.FULL if stop - 1 < seq.full_below else seq.form)
    scored = any(seq.scores is not None for seq, _, _ in plan.chunks)
    # A running row with a grammar may have no part in this step: it lacks pages, or all of its tokens are planned.
    constrained = constrained and any(samples) and any(seq.matcher is not None for seq in plan.rows)
    return StepPlan(step_id, StepKind.PREFILL, 1, sampler, tuple(slots), tuple(tokens), tuple(starts),
                    tuple(samples), tuple(plan.init_rows), tuple(plan.new_pages), scored,
                    tuple(following) if scored else (), constrained=constrained, watched=plan.watched,
                    caught_up=tuple(plan.caught_up))
