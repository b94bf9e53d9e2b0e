"""What a decode round takes with and without proposals, measured on the device before it serves."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import row_state
from jaxinfer.config import EngineConfig
from jaxinfer.draft_lengths import RoundSeconds, Seconds
from jaxinfer.layout import SpeculateLayout
from jaxinfer.row_state import RowState
from jaxinfer.types import SamplerForm

MEASURED_FORMS = (SamplerForm.GREEDY, SamplerForm.SIMPLE)
"""FULL accepts as SIMPLE does."""
CONTEXT = 128
"""Tokens of a row, or a quarter of max_model_len where that is less."""
ROUNDS, LEAST_REPEATS, ENOUGH_SECONDS = 2, 2, 0.05
"""Few: 64 rows on a CPU take 0.1 s a round, and all of it comes before the first answer. Short steps run more often."""

type Step = Callable[[SpeculateLayout, SamplerForm, np.ndarray], float]
"""Runs a step with these inputs on `busy_rows` and says how many seconds it took."""


def measure(config: EngineConfig, layouts: Sequence[SpeculateLayout], step: Step) -> Seconds:
    """Seconds of a round for each form and number of rows: the shortest of some steps behind a first one."""
    def seconds(layout: SpeculateLayout, form: SamplerForm, num_drafted: int) -> float:
        rounds = min(layout.max_rounds, ROUNDS, max(room(config) // (num_drafted + 1), 1))
        inputs = inputs_of(layout, rounds, num_drafted)
        step(layout, form, inputs)
        taken: list[float] = []
        while len(taken) < LEAST_REPEATS or sum(taken) < ENOUGH_SECONDS:
            taken.append(step(layout, form, inputs))
        return min(taken) / rounds

    return {form: {layout.num_rows: RoundSeconds(*(seconds(layout, form, k) for k in (0, 1, layout.num_drafted)))
                   for layout in layouts} for form in MEASURED_FORMS}  # fmt: skip


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


def busy_rows(config: EngineConfig, placement: jax.sharding.Sharding) -> RowState:
    """Every slot runs and samples. Rows share pages where the pool has too few: nobody reads them later."""
    rows = row_state.empty(config.max_num_seqs, config.max_pages_per_row, placement)
    sampling = rows.sampling
    sampling = sampling._replace(temperature=jnp.ones_like(sampling.temperature), top_p=jnp.ones_like(sampling.top_p))
    table = np.arange(rows.page_table.size, dtype=np.int32).reshape(rows.page_table.shape) % config.num_pages
    busy = replace(
        rows, kv_len=jnp.full_like(rows.kv_len, context(config)), stopped=jnp.zeros_like(rows.stopped),
        tokens_left=jnp.full_like(rows.tokens_left, room(config) + 1), page_table=table,
        sampling=sampling)  # fmt: skip
    return jax.device_put(busy, placement)
