"""A plan while it is made, and what planning does to its decode rows. No jax here."""

from jaxinfer.sequence import Sequence
from jaxinfer.types import RowInit, SamplerForm


class Planning:
    """Decode rows, then chunks as (sequence, first position, end position)."""

    def __init__(self, budget: int, num_drafted: int):
        self.budget = budget
        self.rounds = 1
        self.num_drafted = num_drafted
        self.decodes: list[Sequence] = []
        self.chunks: list[tuple[Sequence, int, int]] = []
        self.init_rows: list[RowInit] = []
        self.new_pages: list[tuple[int, int, tuple[int, ...]]] = []
        self.lacked_pages = False

    @property
    def most_tokens(self) -> int:
        """That a decode row gets."""
        return self.rounds * (1 + self.num_drafted)


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


def advance_speculating(rows: list[Sequence], rounds: int, num_drafted: int
                        ) -> tuple[list[int], list[int], SamplerForm]:
    """`advance` where a round brings up to `num_drafted` tokens more."""
    slots = [seq.slot for seq in rows]
    starts = [seq.planned for seq in rows]
    sampler = max((SamplerForm.FULL if seq.certain < seq.full_below else seq.form for seq in rows),
                  default=SamplerForm.GREEDY)
    for seq in rows:
        seq.take_off(rounds, rounds * (1 + num_drafted))
    return slots, starts, sampler


def short_of_pages(rows: list[Sequence], num_tokens: int) -> list[Sequence]:
    """Those of `rows` whose pages do not hold so many more tokens."""
    if num_tokens == 1:
        return [seq for seq in rows if seq.planned >= seq.capacity and seq.planned < seq.end]
    return [seq for seq in rows if min(seq.planned + num_tokens, seq.end) > seq.capacity]
