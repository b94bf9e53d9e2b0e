"""What the tests of how much is drafted share: rows, what rounds take, and steps from which it is learnt."""

from jaxinfer.draft_lengths import CatchUp, DraftLengths
from jaxinfer.round_clock import RoundSeconds
from jaxinfer.sequence import Sequence
from jaxinfer.types import Request, SamplerForm, SamplingParams, StepKind, StepPlan, StepResult

MOST, STOP = 4, 3
CHEAP = RoundSeconds(1.0, 1.1, 1.4)
"""Of a device that reads weights: a proposal costs a tenth of a round."""
DEAR = RoundSeconds(1.0, 5.0, 6.0)
"""Of a device that computes: even kept whole, five tokens take longer than five rounds."""

BURST = {form: {4: CHEAP, 64: DEAR} for form in SamplerForm}
CHUNK = CatchUp(256, 1.0)


def sequences(count: int, temperature: float = 0.0, max_tokens: int = 5000) -> list[Sequence]:
    params = SamplingParams(temperature=temperature)
    requests = [Request(id=str(index), prompt=(1, 2), params=params, max_tokens=max_tokens, seed=0, stop_ids=(STOP,))
                for index in range(count)]  # fmt: skip
    return [Sequence(one, 0) for one in requests]


def lengths(seconds: RoundSeconds, *, most: int = MOST) -> DraftLengths:
    return DraftLengths(most, {form: {64: seconds} for form in SamplerForm})


def teach(drafts: DraftLengths, rows: list[Sequence], counts: list[int], num_drafted=MOST, last: int = 7) -> None:
    """A step in which every row got so many tokens a round, the last of them `last`."""
    size = len(rows)
    plan = StepPlan(0, StepKind.DECODE, len(counts), SamplerForm.GREEDY, tuple(range(size)), ((),) * size, (2,) * size,
                    (True,) * size, num_drafted=(num_drafted,) * size if num_drafted else ())  # fmt: skip
    ids = [7] * (sum(counts) - 1) + [last]
    made = [made_of(rows[0], num_drafted, counts)] * size
    drafts.learn(rows, plan, StepResult([ids] * size, round_counts=[list(counts)] * size, made_counts=made))


def made_of(seq: Sequence, num_drafted: int, counts: list[int]) -> list[int]:
    """Proposals of a drafter that never declines: nothing is proposed beyond the row's end."""
    left = [seq.end + 1 - len(seq.tokens) - sum(counts[:index]) for index in range(len(counts))]
    return [max(min(num_drafted, one - 1), 0) for one in left]


def teach_often(drafts: DraftLengths, rows: list[Sequence], counts: list[int], steps: int, num_drafted=MOST) -> None:
    for _ in range(steps):
        teach(drafts, rows, counts, num_drafted)


def chosen(drafts: DraftLengths, rows: list[Sequence], rounds: int = 8) -> list[int]:
    drafts.choose(rows, rounds, max(seq.form for seq in rows))
    return [seq.num_drafted for seq in rows]
