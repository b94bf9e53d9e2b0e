"""The memory plan: what fits, what is refused, and how it is said."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import memory
from jaxinfer.errors import InvalidConfig, OutOfMemory

PLAN = {"budget": 1000, "weights": 300, "temporaries": 100, "bytes_per_page": 10, "page_size": 16, "needed": 20,
        "most": None, "wanted": None, "on_cpu": False}


def test_pages_take_what_weights_and_temporaries_leave():
    plan = memory.plan_pages(**PLAN)
    assert plan.num_pages == 60
    assert plan.pages + plan.weights + plan.temporaries <= plan.budget


@pytest.mark.parametrize(("change", "pages"), [
    ({"most": 40}, 40), ({"most": 90}, 60), ({"wanted": 25}, 25), ({"needed": 60}, 60)])
def test_limits_of_use_and_of_the_user(change, pages):
    assert memory.plan_pages(**PLAN | change).num_pages == pages


@pytest.mark.parametrize("change", [{"needed": 61}, {"wanted": 61}, {"weights": 950}, {"most": 10}])
def test_what_does_not_fit_is_refused_with_its_figures(change):
    with pytest.raises(OutOfMemory, match=r"pages of 16 tokens need .* room for \d+ pages") as caught:
        memory.plan_pages(**PLAN | change)
    assert "max_model_len" in str(caught.value)


@pytest.mark.parametrize(("change", "said", "unsaid"), [
    ({}, ["temporaries", "raise gpu_memory_utilization"], ["free memory"]),
    ({"temporaries": None, "on_cpu": True}, ["free memory of this machine"], ["temporaries", "gpu_memory_utilization"]),
])
def test_the_advice_works_on_the_platform(change, said, unsaid):
    with pytest.raises(OutOfMemory) as caught:
        memory.plan_pages(**PLAN | {"wanted": 71} | change)
    assert all(words in str(caught.value) for words in said)
    assert not any(words in str(caught.value) for words in unsaid)


def test_temporaries_that_are_not_measured_are_left_out():
    plan = memory.plan_pages(**PLAN | {"temporaries": None})
    assert plan.num_pages == 70
    assert "temporaries" not in plan.table()
    assert "temporaries" in memory.plan_pages(**PLAN).table()


def test_too_few_pages_asked_for_are_a_setting_not_a_lack_of_memory():
    with pytest.raises(InvalidConfig, match=r"num_pages: 19 pages .* under the 20 needed"):
        memory.plan_pages(**PLAN | {"wanted": 19})


def test_the_table_adds_up():
    in_bytes = ("budget", "weights", "temporaries", "bytes_per_page")
    plan = memory.plan_pages(**{name: value * 2**20 if name in in_bytes else value for name, value in PLAN.items()})
    figures = [float(line.split()[-2].replace(",", "")) for line in plan.table().splitlines()]
    assert figures[0] == sum(figures[1:])


def test_temporaries_come_from_the_compiled_programs():
    def wasteful(x):
        return jnp.sort(x @ x.T, axis=0).sum(1)

    small, large = (jax.jit(wasteful).lower(jnp.zeros((size, 8))).compile() for size in (64, 512))
    measured = memory.measure_temporaries(lambda: [(small, 0), (large, 0)])
    assert measured >= 512 * 512 * 4
    assert memory.measure_temporaries(lambda: [(small, 0)]) < measured
    assert memory.measure_temporaries(lambda: [(small, 0), (large, 7)]) == measured + 7


def test_weights_are_counted_on_the_fullest_device():
    devices = jax.devices()[:2]
    whole = jax.device_put(jnp.zeros(1000, jnp.float32), devices[0])
    other = jax.device_put(jnp.zeros(10, jnp.float32), devices[1])
    assert memory.weight_bytes({"a": whole, "b": [other]}) == 4000


def test_the_host_has_some_memory():
    assert memory.available_host_memory() > 2**28
