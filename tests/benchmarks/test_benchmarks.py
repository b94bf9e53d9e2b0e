"""Every bench runs: its smoke run prints a table and, as the last line, the JSON object that `make bench` reads."""

import json
import os
import random
import subprocess
import sys
from datetime import date

import pytest

from benchmarks.report import Result, exit_code
from benchmarks.workloads import interleaved, log_uniform, median_ratio

SECONDS = 300
"""Far more than a smoke run takes, even beside others."""

LIMITED = {
    "mixed_load": ["compiles after ready", "pages held when idle", "failed steps"],
    "batching": ["share of the device limit", "tokens/s over one row's", "tokens/s over static batches'"],
    "grammar": ["V 4096: masks of 64 rows, a step"],
    "host": ["64 rows", "256 rows"],
    "prefix": ["time to first token, no cache / cache", "tokens/s, cache / no cache"],
    "quality": ["int8 weights: over bfloat16", "int8 weights and activations: over bfloat16",
                "int8 pages: over bfloat16", "fp8 pages: over bfloat16",
                "int8 weights, activations and pages: over bfloat16"],
    "schemas": ["invalid", "masks / hidden states"],
    "serve": [*(f"{service}, {streams}, {tokens} a message: server CPU a token, ours / bare"
                for service in ("jaxinfer.v1", "vllm.grpc") for tokens in (8, 1)
                for streams in ("1 stream", "16 streams", "64 streams")),
              "jaxinfer.v1, 80 % load: p99 inter-token gap / longest step",
              "vllm.grpc, 80 % load: p99 inter-token gap / longest step", "flood: from full queue to recovery"],
    "speculation": ["1 rows, drafting / plain", "copies: prompt lookup / plain",
                    "copies with an edit every 16 tokens: prompt lookup / plain",
                    "acceptance 0.6, 2 drafted: efficiency"],
    "start": ["jaxinfer --help", "warm over cold, to the first token"],
}
"""Bench to its results that have a floor."""


@pytest.fixture(scope="module")
def environment():
    """One device, as benches have it, and the suite's compile cache, so that equal engines compile once."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(flags)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITED)
def test_a_smoke_run_yields_every_field(name, environment, repository):
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--quick"]
    run = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=SECONDS,
                         check=False)
    assert run.returncode in (0, 1), run.stderr
    *table, last = run.stdout.splitlines()
    found = json.loads(last)
    assert list(found) == ["bench", "results", "machine", "date"]
    assert (found["bench"], found["date"]) == (name, date.today().isoformat()) and found["machine"]
    results = [Result(**fields) for fields in found["results"]]
    assert [result.name for result in results if result.floor is not None] == LIMITED[name]
    assert all(result.value >= 0 and result.better in ("higher", "lower") for result in results)
    assert run.returncode == exit_code(results)
    assert len(table) == 1 + len(results)


def test_lengths_have_the_same_mix_in_loads_of_any_size():
    few, many = (log_uniform(count, random.Random(0)) for count in (32, 256))
    assert min(many) == 8 and max(many) in (254, 255, 256)
    assert sum(few) / 32 == pytest.approx(sum(many) / 256, rel=0.01)
    assert many != sorted(many)


def test_contenders_take_turns():
    calls = []
    found = interleaved(2, {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"})
    assert calls == ["a", "b", "b", "a"]
    assert found == {"a": [1.0, 4.0], "b": [2.0, 3.0]}
    assert median_ratio(found["b"], found["a"]) == pytest.approx((2 + 3 / 4) / 2)
