"""The counting model behind the real engine: shared by the tests of everything around the model."""

from collections.abc import Callable

import jax

from jaxinfer.config import EngineConfig
from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.engine import Engine
from jaxinfer.executor import Executor
from jaxinfer.page_pool import PagePool
from jaxinfer.scheduler import Scheduler
from jaxinfer.testing import CountingModel
from jaxinfer.types import Request, SamplingParams

VOCAB = 256


def small_config(**changes) -> EngineConfig:
    """Few pages, so that rows are preempted; few and small buckets, so that it compiles in seconds."""
    fields = {"max_model_len": 96, "num_pages": 30, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 32,
              "max_decode_rounds": 4, "token_buckets": (8, 32), "row_buckets": (4,)} | changes
    return EngineConfig(**fields)


def new_executor(config: EngineConfig, model: CountingModel | None = None) -> Executor:
    model = model or CountingModel(VOCAB)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    executor = Executor(model, jax.device_put(model.new_params(), place), config, place)
    executor.warm_up(workers=2, progress=lambda name: None)
    return executor


def new_engine(executor: Executor, *, drafts: DraftLengths | None = None, **options) -> Engine:
    """A fresh engine over a (possibly used) executor: pages and rows start empty."""
    executor.reset()
    config = executor.config
    return Engine(executor, Scheduler(config, PagePool(config.num_pages, config.page_size), drafts=drafts), **options)


def request(id: str, prompt, max_tokens: int, *, stop_ids=(), priority=0, arrival=0.0, salt="", seed=0, given=None,
            **params) -> Request:
    """seed: drawn for the request. given: the one that it brought instead."""
    return Request(id=id, prompt=tuple(prompt), params=SamplingParams(max_tokens=max_tokens, seed=given, **params),
                   max_tokens=max_tokens, seed=seed if given is None else given, stop_ids=tuple(stop_ids),
                   priority=priority, arrival=arrival, cache_salt=salt)


def next_number(last: int) -> int:
    return (last + 1) % VOCAB


def counted(request: Request, following: Callable[[int], int] = next_number) -> list[int]:
    """What the counting model must answer (greedily, where a stop id is banned and something else comes out).

    following: the model's next token.
    """
    ids, last = [], request.prompt[-1]
    for index in range(request.max_tokens):
        last = following(last)
        banned = index < request.params.min_tokens and last in request.stop_ids
        if banned:  # all other logits are equal, and the first of them is taken
            last = next(token for token in range(VOCAB) if token not in request.stop_ids)
        ids.append(last)
        if last in request.stop_ids:
            break
    return ids
