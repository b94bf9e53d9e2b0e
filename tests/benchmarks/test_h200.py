"""bench_h200 away from the card: it says that it was skipped, and its parts that need no GPU work."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.h200 import attention, contenders, correctness, decode_step

TINY = dataclasses.replace(decode_step.CONFIG, vocab_size=256, hidden_size=128, intermediate_size=256, num_layers=2,
                           num_heads=4, num_kv_heads=2, head_dim=32, windows=(0, 0))  # fmt: skip


def test_without_the_card_every_value_is_null_and_the_exit_is_0(repository):
    run = subprocess.run([sys.executable, "-m", "benchmarks.bench_h200"], cwd=repository, capture_output=True,
                         text=True, timeout=120, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"})  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("skipped: this is cpu")
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found["results"]) >= 16 and all(result["value"] is None for result in found["results"])
    assert all(result["floor"] is not None for result in found["results"])


def test_the_fastest_other_is_compared_with():
    found = {"ours": [1.0, 2.0, 1.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 3.0, 2.0]}
    assert contenders.speedup(found, "ours") == (2.0, "fast")
    ratio, name = contenders.speedup({"ours": [1.0]}, "ours")
    assert np.isnan(ratio) and name == "nobody"


def test_a_load_counts_what_must_be_moved_and_computed():
    load = attention.Load("two rows", (1, 3), (10, 5), page_size=16, num_layers=2)
    assert load.kv_bytes == 2 * 15 * 2 * 8 * 128 * 2
    assert load.causal_flops == 2 * (10 + 3 + 4 + 5) * 4 * 32 * 128
    assert attention.ragged_lens(32, 4096) == attention.ragged_lens(32, 4096)
    assert min(attention.ragged_lens(999, 4096)) >= 2048 and max(attention.ragged_lens(999, 4096)) < 6144


@pytest.mark.parametrize("load", [
    attention.decode("decode", (40, 3), page_size=16, num_layers=2),
    attention.Load("prefill", (40,), (40,), page_size=16, num_layers=2),
], ids=lambda load: load.name)  # fmt: skip
def test_our_contender_runs_a_pass_after_the_other(load: attention.Load):
    seconds = contenders.race([attention.ours(load, "xla")], rounds=2)
    assert len(seconds["xla"]) == 2 and min(seconds["xla"]) > 0


def test_the_decode_step_counts_weights_and_keys_and_values():
    step = decode_step.make(2, TINY)
    attention_weights, mlp = 128 * (4 + 2 + 2 + 4) * 32, 3 * 128 * 256
    weights = 2 * (attention_weights + mlp + 2 * 128) + 128 + 128 * 256
    assert step.num_bytes == 2 * weights + 2 * 1024 * 2 * 2 * 2 * 32 * 2
    assert len(contenders.race([step.contender], rounds=1)) == 1


def test_a_wrong_row_is_named_and_nan_is_wrong():
    wanted = np.ones((3, 4))
    assert correctness.wrong_rows(wanted + 0.005, wanted, "bfloat16") is None
    assert "1 of 3 rows" in str(correctness.wrong_rows(wanted + np.array([[0], [0.1], [0]]), wanted, "bfloat16"))
    assert "2 of 3 rows" in str(correctness.wrong_rows(wanted * [[1], [np.nan], [np.nan]], wanted, "bfloat16"))
