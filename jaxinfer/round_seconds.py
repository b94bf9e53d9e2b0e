"""What a decode round takes with and without proposals, measured on the device before it serves."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.layout import DecodeLayout, SpeculateLayout
from jaxinfer.round_clock import RoundSeconds, Seconds
from jaxinfer.row_state import RowState
from jaxinfer.types import SamplerForm

CONTEXT = 128
"""Tokens of a row, or a quarter of max_model_len where that is less."""
LONG, FEWEST_ROUNDS = 0.05, 2
"""A step has as many rounds as fit into LONG seconds, so that they share the cost of its dispatch as in service, and at
least so many: 64 rows on a CPU take 0.1 s a round, and all of it comes before the first answer.
"""
FEWEST_STEPS, MOST_STEPS, ALL_STEPS = 4, 8, 0.3
"""One behind the other, each dispatched while the one before runs: on a CPU that takes a core from it. As many as fit
into ALL_STEPS seconds; those between the first and the last count, together, as the end of each is seen a bit late.
"""
PASSES = 2
"""Over all programs, so that a slow moment does not fall on all that is measured of one: in nine starts with one pass
the first program's plain round came out at 1.0 to 2.4 ms.
"""

type Layouts = tuple[DecodeLayout | SpeculateLayout, SpeculateLayout]
"""Of the programs for rounds without and with proposals of so many rows; they may be one program."""
type Step = Callable[[DecodeLayout | SpeculateLayout, SamplerForm, np.ndarray, int], float]
"""Runs so many steps with these inputs on `busy_rows`; seconds that one took, but for the first and the last."""


def measure(config: EngineConfig, layouts: Sequence[Layouts], step: Step) -> Seconds:
    """Seconds of a round for each form and number of rows: the shorter of two passes."""
    def turn(form: SamplerForm, both: Layouts, rounds: int, steps: int) -> tuple[float, ...]:
        plain, speculate = both
        kinds = (plain, 0), (speculate, 1), (speculate, speculate.num_drafted)
        return tuple(step(layout, form, inputs_of(layout, rounds, num_drafted), steps) / rounds
                     for layout, num_drafted in kinds)

    def sizes(form: SamplerForm, both: Layouts) -> tuple[int, int]:
        """Rounds of a step, and steps."""
        most = min(both[1].max_rounds, room(config) // MOST_STEPS // (both[1].num_drafted + 1))
        longest = max(turn(form, both, 1, FEWEST_STEPS))
        rounds = max(min(max(int(LONG / longest), FEWEST_ROUNDS), most), 1)
        return rounds, min(max(int(ALL_STEPS / (rounds * longest)), FEWEST_STEPS), MOST_STEPS)

    every = {(form, both): sizes(form, both) for form in SamplerForm for both in layouts}
    taken = {one: [] for one in every}
    for _ in range(PASSES):
        for (form, both), (rounds, steps) in every.items():
            taken[form, both].append(turn(form, both, rounds, steps))
    return {form: {both[1].num_rows: RoundSeconds(*map(min, zip(*taken[form, both], strict=True)))
                   for both in layouts} for form in SamplerForm}  # fmt: skip


def context(config: EngineConfig) -> int:
    """Tokens of each busy row."""
    return min(CONTEXT, config.max_model_len // 4)


def room(config: EngineConfig) -> int:
    """Tokens that a busy row takes before it stops."""
    return config.max_model_len - context(config) - 1


def inputs_of(layout: DecodeLayout | SpeculateLayout, rounds: int, num_drafted: int) -> np.ndarray:
    """i32[layout.size]: as many rows as there are slots for, no new pages."""
    flat = np.full(layout.size, layout.num_slots + 1, np.int32)
    num_rounds, slots, *drafted, _ = layout.views(flat)
    num_rows = min(layout.num_rows, layout.num_slots)
    slots[:num_rows] = np.arange(num_rows)
    num_rounds[:] = rounds
    for each in drafted:
        each[:] = num_drafted
    return flat


def busy_rows(config: EngineConfig, rows: RowState, placement: jax.sharding.Sharding) -> RowState:
    """Every slot runs and samples. Rows share pages where the pool has too few: nobody reads them later.

    rows: `row_state.empty`.
    """
    sampling = rows.sampling
    sampling = sampling._replace(temperature=jnp.ones_like(sampling.temperature), top_p=jnp.ones_like(sampling.top_p))
    table = np.arange(rows.page_table.size, dtype=np.int32).reshape(rows.page_table.shape) % config.num_pages
    busy = replace(
        rows, kv_len=jnp.full_like(rows.kv_len, context(config)), stopped=jnp.zeros_like(rows.stopped),
        tokens_left=jnp.full_like(rows.tokens_left, room(config) + 1), page_table=table,
        sampling=sampling)  # fmt: skip
    return jax.device_put(busy, placement)
