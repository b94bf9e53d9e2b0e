"""Logits at every position of a prompt, for researchers and parity tests: the served programs, no second model."""

from collections.abc import Sequence

import numpy as np

from jaxinfer.engine import Engine
from jaxinfer.errors import Overloaded
from jaxinfer.executor import Executor
from jaxinfer.types import SamplerForm, StepKind, StepPlan

NO_STEP = -1


def prompt_logits(engine: Engine, executor: Executor, tokens: Sequence[int]) -> np.ndarray:
    """f32[n, V] of n tokens, in chunks of the largest prefill bucket, on pages borrowed from the pool.

    Call it on the engine's thread with nothing in flight (`EngineThread.run`). Raises Overloaded when the running
    requests leave too few pages.
    """
    pool, config = engine.scheduler.pool, executor.config
    count = -(-len(tokens) // config.page_size)
    pages = pool.allocate(count)
    if pages is None:
        raise Overloaded(f"logits of {len(tokens)} tokens need {count} pages, {pool.num_free} are free; "
                         "try again when fewer requests run")
    try:
        size = config.token_buckets[-1]
        plans = [_plan(executor, tokens[first:first + size], first, pages if first == 0 else [])
                 for first in range(0, len(tokens), size)]
        return np.concatenate([executor.logits(plan) for plan in plans])
    finally:
        pool.release(pages)


def _plan(executor: Executor, chunk: Sequence[int], first: int, pages: list[int]) -> StepPlan:
    """One chunk of one row in the scratch slot; prompt_logprobs chooses the bucket compiled for scoring."""
    slot = executor.config.max_num_seqs
    return StepPlan(
        NO_STEP, StepKind.PREFILL, 1, SamplerForm.GREEDY, (slot,), (tuple(chunk),), (first,), (False,),
        new_pages=((slot, 0, tuple(pages)),) if pages else (), prompt_logprobs=True, next_tokens=(-1,))
