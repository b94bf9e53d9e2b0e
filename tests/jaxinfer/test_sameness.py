"""The same request gives the same tokens alone or in any mix: chunked, cached, preempted, cancelled around, or not.

Compared with plain step-by-step decoding (`plain_decoding`), up to the first position where the two best candidates,
noise included, are closer than 1e-4: between buckets float32 logits differ by about 1e-6. At least half of the tokens
of each mix must come before such a position.
"""

import random
from collections import defaultdict

import jax
import jax.numpy as jnp
import pytest
from counting import new_engine
from plain_decoding import PlainLlama, decode

from jaxinfer import loading
from jaxinfer.config import EngineConfig
from jaxinfer.executor import Executor
from jaxinfer.models import make_decoder
from jaxinfer.steps import DeviceState
from jaxinfer.types import Request, SamplingParams

PAGE = 4


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "tests" / "data" / "parity" / "llama-tied"


@pytest.fixture(scope="module")
def plain(folder):
    return PlainLlama(folder)


@pytest.fixture(scope="module")
def executor(folder):
    """Chunks of at most 16 tokens and 18 pages: long prompts are chunked, and four long rows do not fit."""
    loaded = loading.load_model(folder, dtype=jnp.float32)
    model = make_decoder(loaded.config, dtype=jnp.float32, page_size=PAGE)
    config = EngineConfig(max_model_len=64, num_pages=18, page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=16,
                          max_decode_rounds=4, token_buckets=(16,), row_buckets=(4,))
    executor = Executor(model, loaded.params, config, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    executor.warm_up(workers=2, progress=lambda name: None)
    fresh = executor._new_state
    executor._new_state = lambda: all_nan(fresh())
    return executor


def all_nan(state: DeviceState) -> DeviceState:
    """What no row has written is NaN, which would break a row that reads it."""
    return state._replace(kv_pages=jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), state.kv_pages))


def random_request(rng: random.Random, index: int) -> Request:
    shared = [random.Random(rng.choice([1, 2])).randrange(3, 256) for _ in range(rng.choice([0, 8, 17]))]
    prompt = tuple(shared + [rng.randrange(3, 256) for _ in range(rng.randint(1, 20))])
    max_tokens = rng.randint(1, 24)
    params = SamplingParams(temperature=rng.choice([0.0, 0.8, 1.3]), n=rng.choice([1, 1, 2]), max_tokens=max_tokens,
                            prompt_logprobs=rng.choice([None, None, None, 0]))
    return Request(id=str(index), prompt=prompt, params=params, max_tokens=max_tokens,
                   seed=rng.choice([7, -5, 2**62 + 3, index]), stop_ids=tuple(rng.sample(range(256), 2)),
                   arrival=float(index), priority=rng.choice([0, 0, 2]))


def run_mix(executor, rng: random.Random, requests: list[Request]):
    """All requests, arriving over some steps, among others that are cancelled on the way."""
    engine = new_engine(executor)
    arrivals = {one.id: rng.randint(0, 20) for one in requests}
    victims = [random_request(rng, 1000 + number) for number in range(3)]
    chunks, step = defaultdict(list), 0
    while engine.has_work or step <= 20:
        for one in requests:
            if arrivals[one.id] == step:
                engine.add(one)
        for number, victim in enumerate(victims):
            if step == 2 + 5 * number:
                engine.add(victim)
            if step == 5 + 5 * number:
                engine.cancel(victim.id)
        for chunk in engine.step():
            chunks[chunk.request_id, chunk.index] += chunk.token_ids
        engine.scheduler.check_invariants()
        step += 1
    return chunks, engine.scheduler


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_equals_plain_decoding(executor, plain, seed, record_property):
    rng = random.Random(seed)
    requests = [random_request(rng, index) for index in range(7)]
    chunks, scheduler = run_mix(executor, rng, requests)
    ties = compared = total = 0
    for one in requests:
        for index in range(one.params.n):
            wanted, tie = decode(plain, one, index)
            got = chunks[one.id, index]
            ties += tie is not None
            compared += len(wanted[:tie])
            total += len(wanted)
            assert got[:tie] == wanted[:tie], f"request {one.id} sample {index}"
            if tie is None:
                assert len(got) == len(wanted)
    print(f"seed {seed}: {compared} of {total} tokens compared, {ties} sequences up to a tie closer than 1e-4, "
          f"{scheduler.metrics.preemptions} preemptions, prefix hit rate {scheduler.metrics.prefix_hit_rate:.2f}")
    record_property("ties", ties)
    record_property("compared", compared)
    assert compared >= total / 2, "ties come too early: most tokens were not compared"


def test_the_mixes_reach_preemption_and_prefix_hits(executor):
    """The test above means little unless its mixes preempt rows and hit the prefix cache."""
    preemptions = hits = 0
    for seed in range(6):
        rng = random.Random(seed)
        _, scheduler = run_mix(executor, rng, [random_request(rng, index) for index in range(7)])
        preemptions += scheduler.metrics.preemptions
        hits += scheduler.metrics.cached_tokens
    assert preemptions > 3
    assert hits > 0
