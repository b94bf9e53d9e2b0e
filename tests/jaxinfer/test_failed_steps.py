"""Steps that raise inside of the compiled program, and programs that cannot be compiled."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import VOCAB, counted, new_engine, new_executor, request, small_config
from counting_mixes import ids_of, run

from jaxinfer.compile_counter import CompileCounter
from jaxinfer.errors import CompileFailed
from jaxinfer.executor import Executor
from jaxinfer.fault_points import failing
from jaxinfer.programs import SAMPLE, declare
from jaxinfer.testing import CountingModel


@dataclass(eq=False)
class Fuse:
    """Blows at the given passes of a forward, counted from 0."""

    at: set[int] = field(default_factory=set)
    passes: int = 0

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        self.passes += 1
        if self.passes - 1 in self.at:
            raise RuntimeError("the device is gone")
        return tokens


@dataclass(frozen=True)
class Fused(CountingModel):
    fuse: Fuse = field(default_factory=Fuse, hash=False, compare=False)

    def forward(self, params, tokens, positions, kv_pages, rows, *, max_q_len):
        tokens = jax.pure_callback(self.fuse, jax.ShapeDtypeStruct(tokens.shape, jnp.int32), tokens)
        return super().forward(params, tokens, positions, kv_pages, rows, max_q_len=max_q_len)


@pytest.fixture(scope="module")
def model() -> Fused:
    return Fused(VOCAB)


@pytest.fixture(scope="module")
def executor(model):
    return new_executor(small_config(), model)


@pytest.mark.parametrize("at", [{0}, {3}, {2, 9}, {4, 5}])
def test_rows_are_replayed_from_their_tokens_and_match(at, executor, model):
    """More requests than slots: some wait, some have begun, some are preempted when it happens."""
    engine = new_engine(executor)
    model.fuse.at, model.fuse.passes = at, 0
    requests = [request(str(index), range(index * 20, index * 20 + 3 + 9 * (index % 3)), 25, arrival=float(index),
                        temperature=float(index % 2)) for index in range(9)]
    for one in requests:
        engine.add(one)
    lost = executor._state.kv_pages
    compiles = CompileCounter()
    chunks = run(engine)
    assert model.fuse.passes > max(at), "it has happened"
    assert engine.scheduler.metrics.failed_steps == len(at)
    assert {one.id: ids_of(chunks[one.id, 0]) for one in requests} == {one.id: counted(one) for one in requests}
    assert lost.is_deleted() and not executor._state.kv_pages.is_deleted()
    assert compiles.count == 0, compiles.names
    compiles.close()


@pytest.mark.parametrize("after", [0, 3])
def test_a_program_that_cannot_be_compiled_stops_the_start_by_name(after):
    reason = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory\n" + "more of it\n" * 100)
    executor = Executor(CountingModel(VOCAB), jnp.float32(0), small_config(),
                        jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with failing("compile", reason, after=after), pytest.raises(CompileFailed) as caught:
        executor.warm_up(workers=2, progress=lambda name: None)
    names = {program.name for program in declare(executor.signature).values()}
    text = str(caught.value)
    assert any(repr(name) in text for name in names) and "Ran out of memory" in text and "more of it" not in text
    assert "max_num_seqs" in text


@pytest.mark.parametrize("name", ["plan", "dispatch", "read", "account", "a program"])
def test_memory_needs_to_hold_the_pages_once(name, executor, model, monkeypatch):
    """What a failed step has left of them is gone before new ones are made."""
    model.fuse.at = set()
    engine = new_engine(executor)
    monkeypatch.setattr(Fused, "new_pages", only_alone(executor._state.kv_pages))
    one = request("a", range(3), 20, temperature=0.0)
    engine.add(one)
    with ExitStack() as faults:
        if name == "a program":  # the prefill's state is made, and the sampler behind it fails
            faults.enter_context(failing_program(executor, SAMPLE))
        else:
            faults.enter_context(failing(name, RuntimeError("the device is gone"), after=2))
        chunks = run(engine)
    assert engine.scheduler.metrics.failed_steps == 1
    assert ids_of(chunks["a", 0]) == counted(one)


def only_alone(pages):
    """`new_pages` on a device whose memory they fill. Other tests may have left some, which do not count."""
    others = {id(array) for array in jax.live_arrays() if array is not pages}

    def new_pages(self, num_pages, page_size):
        if any(array.shape == pages.shape and id(array) not in others and not array.is_deleted()
               for array in jax.live_arrays()):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: pages are there already")
        return CountingModel.new_pages(self, num_pages, page_size)

    return new_pages


@contextmanager
def failing_program(executor, key):
    """Meanwhile the first call of a program raises."""
    program, calls = executor._programs[key], count()

    def call(*arguments):
        if next(calls) == 0:
            raise RuntimeError("the device is gone")
        return program(*arguments)

    executor._programs[key] = call
    try:
        yield
    finally:
        executor._programs[key] = program


def test_a_step_that_fails_while_the_engine_is_drained_is_replayed_too(executor, model):
    model.fuse.at = set()
    engine, one = new_engine(executor), request("a", range(3), 20, temperature=0.0)
    engine.add(one)
    found = engine.step()
    with failing("read", RuntimeError("the device is gone")):
        found += engine.drain()
    chunks = run(engine)["a", 0]
    assert engine.scheduler.metrics.failed_steps == 1
    assert ids_of([*found, *chunks]) == counted(one)
