"""The counter counts what it should, on the thread it should, and is forgotten without a trace."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.compile_counter import CompileCounter

pytestmark = pytest.mark.smoke


def compile_something() -> None:
    def never_seen_before(x):
        return jnp.tanh(x) + 1

    jax.jit(never_seen_before).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()


def in_a_thread(function) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_counts_compiles_of_every_thread_until_closed():
    counter = CompileCounter()
    compile_something()
    in_a_thread(compile_something)
    assert (counter.count, counter.loaded) == (2, 0)
    assert any("never_seen_before" in name for name in counter.names)
    counter.close()
    compile_something()
    assert counter.count == 2


def test_calls_of_a_compiled_program_do_not_count():
    double = jax.jit(lambda x: x * 2)
    double(jnp.ones(3))
    counter = CompileCounter()
    double(jnp.ones(3))
    assert counter.count == 0


def test_can_watch_one_thread():
    counter = CompileCounter()
    in_a_thread(counter.watch_this_thread)
    compile_something()
    assert counter.count == 0
    counter.watch_this_thread()
    compile_something()
    assert counter.count == 1


def test_a_forgotten_counter_is_freed():
    counter = CompileCounter()
    seen = weakref.ref(counter)
    del counter
    gc.collect()
    assert seen() is None
    compile_something()
