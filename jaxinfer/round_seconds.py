"""What a decode round takes with and without proposals, measured on the device before it serves."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.draft_lengths import RoundSeconds, Seconds
from jaxinfer.layout import SpeculateLayout
from jaxinfer.row_state import RowState
from jaxinfer.types import SamplerForm

CONTEXT = 128
"""Tokens of a row, or a quarter of max_model_len where that is less."""
ROUNDS, REPEATS, LONG = 2, 2, 0.05
"""Few: 64 rows on a CPU take 0.1 s a round, and all of it comes before the first answer. Where a round takes less than
LONG seconds, as many as a step may have share the cost of its dispatch, and there are three times the repeats.
"""

type Step = Callable[[SpeculateLayout, SamplerForm, np.ndarray], float]
"""Runs a step with these inputs on `busy_rows` and says how many seconds it took."""


def measure(config: EngineConfig, layouts: Sequence[SpeculateLayout], step: Step) -> Seconds:
    """Seconds of a round for each form and number of rows: the shortest of some steps, taken in turns."""
    def seconds(layout: SpeculateLayout, form: SamplerForm) -> RoundSeconds:
        kinds = (0, 1, layout.num_drafted)
        first = max([step(layout, form, inputs_of(layout, 1, kind)) for kind in kinds])
        most, repeats = (layout.max_rounds, 3 * REPEATS) if first < LONG else (ROUNDS, REPEATS)
        rounds = max(min(layout.max_rounds, most, room(config) // (layout.num_drafted + 1)), 1)
        taken = [[step(layout, form, inputs_of(layout, rounds, kind)) for kind in kinds] for _ in range(repeats)]
        return RoundSeconds(*(min(kind) / rounds for kind in zip(*taken, strict=True)))

    return {form: {layout.num_rows: seconds(layout, form) for layout in layouts} for form in SamplerForm}


def context(config: EngineConfig) -> int:
    """Tokens of each busy row."""
    return min(CONTEXT, config.max_model_len // 4)


def room(config: EngineConfig) -> int:
    """Tokens that a busy row takes before it stops."""
    return config.max_model_len - context(config) - 1


def inputs_of(layout: SpeculateLayout, rounds: int, num_drafted: int) -> np.ndarray:
    """i32[layout.size]: as many rows as there are slots for, no new pages."""
    flat = np.full(layout.size, layout.num_slots + 1, np.int32)
    num_rounds, slots, drafted, _ = layout.views(flat)
    num_rows = min(layout.num_rows, layout.num_slots)
    slots[:num_rows] = np.arange(num_rows)
    num_rounds[:], drafted[:] = rounds, num_drafted
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
