"""Sizes that nothing smaller is compiled for, against the roofline of the chips' published figures."""

from itertools import pairwise

import pytest

from jaxinfer.config import row_sizes, token_sizes
from jaxinfer.smallest_steps import SmallestSteps, smallest_steps
from pallas_kernels.chips import CHIPS
from pallas_kernels.dispatch import Device


def on(chip: str, weight_format: str | None = None) -> SmallestSteps:
    return smallest_steps(Device("gpu" if chip == "h200" else "tpu", CHIPS[chip].kind), weight_format)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("weight_format", "weight_bytes", "product"), [
    (None, 2, "bfloat16"), ("int8", 1, "bfloat16"), ("int8_dynamic", 1, "int8")])
def test_a_step_of_the_smallest_size_computes_for_about_as_long_as_it_reads(chip, weight_format, weight_bytes, product):
    figures, weights = CHIPS[chip], 8e9
    flops = figures.flops_per_second.get(product, figures.flops_per_second["bfloat16"])
    reading = weights * weight_bytes / figures.hbm_bytes_per_second
    tokens = on(chip, weight_format).tokens
    assert 2 * weights * tokens / flops <= 1.1 * reading
    assert 2 * weights * 2 * tokens / flops > 1.1 * reading


def test_other_devices_pay_for_every_row():
    assert smallest_steps(Device("cpu", "cpu"), None) == SmallestSteps(8, 2)


@pytest.mark.parametrize("largest", [*range(1, 70), 100, 128, 200, 256, 300, 512, 1000, 4096])
@pytest.mark.parametrize("least", [2, 16])
def test_row_sizes_are_few_and_end_at_the_largest(largest, least):
    sizes = row_sizes(largest, least)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == max(largest, 2) and len(sizes) <= 4
    assert all(after <= 4 * before for before, after in pairwise(sizes))
    assert sizes[0] <= max(least, largest / 16)


def test_sizes_of_a_default_server():
    assert (token_sizes(2048), row_sizes(64)) == ((8, 64, 128, 256, 512, 1024, 2048), (2, 8, 32, 64))
    assert (on("v6e").token_buckets(2048), on("v6e").row_buckets(64)) == ((512, 1024, 2048), (16, 64))
    assert on("v5e").token_buckets(2048) == (256, 512, 1024, 2048)
    assert on("h200").row_buckets(64) == (2, 8, 32, 64)
