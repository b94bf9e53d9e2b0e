"""bench_h200 away from the card: it says that it was skipped, and its parts that need no GPU work."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bench_h200
from benchmarks.h200 import attention, contenders, correctness, decode_step, isolation, marks, parts
from benchmarks.report import Result, exit_code

BY_XLA = partial(attention.public, implementation="xla")
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
    seconds = contenders.race([attention.ours(load, "ours", BY_XLA)], rounds=2)
    assert len(seconds["ours"]) == 2 and min(seconds["ours"]) > 0


def test_rows_that_differ_are_counted():
    load = attention.decode("decode", (40, 3, 17), page_size=16, num_layers=2)

    def spoiled(load: attention.Load, arrays: attention.Rows) -> attention.Layer:
        layer = BY_XLA(load, arrays)

        def wrong(*arguments):
            outputs, pages = layer(*arguments)
            return outputs.at[1, 0, 0].set(jnp.nan).at[2].multiply(1.02), pages

        return wrong

    assert attention.unlike(load, BY_XLA, BY_XLA) == 0
    assert attention.unlike(load, spoiled, BY_XLA) == 2


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


def test_every_question_has_its_floor_and_goal():
    """As the floors and goals were set: attention 0.80 / 0.90 and 1.0 / 1.15 (one row 1.5), and so on."""
    found = {mark.name: (mark.floor, mark.goal) for mark in marks.marks()}
    assert len(found) == len(marks.marks()) == 4 * 2 + 2 + 2 + 8 + 2
    assert found["decode 32 x 4096 ragged, pages of 16: share of read bandwidth"] == (0.80, 0.90)
    assert found["decode 32 x 4096, pages of 64: against the best peer"] == (1.0, 1.15)
    assert found["decode 1 x 1024, pages of 16: against the best peer"] == (1.0, 1.5)
    assert found["prefill 8192 causal, pages of 64: against the best peer"] == (0.90, 1.03)
    assert found["int8 matmul 4096 rows, quantisation included: against the best peer"] == (1.0, 1.25)
    assert found["int8 matmul 1 rows, weight-only: share of read bandwidth"] == (0.70, 0.88)
    assert found["8B decode step, 32 rows: share of read bandwidth"] == (0.80, 0.93)


def test_a_load_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    def broken():
        yield Result("half of it", 1.0, "")
        raise ZeroDivisionError("by a test")

    def loads(rounds: int):
        yield "broken", broken
        yield "sound", lambda: [Result("sound", 2.0, "", 1.0, 3.0, "higher")]

    monkeypatch.setitem(parts.LOADS, "decode", loads)
    (half, failed), (sound,) = parts.measured("decode", 2)
    assert half.name == "half of it" and sound.value == 2.0
    assert failed.name == "broken: failed (ZeroDivisionError: by a test)"
    assert exit_code([half, failed, sound]) == 1 and exit_code([half, sound]) == 0


def test_without_a_peer_there_is_no_ratio():
    alone = parts.against(marks.SPEEDUP_OF_PREFILL, [1.0], {})
    assert "no peer ran" in alone.name and exit_code([alone]) == 1
    assert parts.against(marks.SPEEDUP_OF_PREFILL, [1.0], {"a": [2.0], "b": [3.0]}).name.endswith("against a")


PART = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.h200 import isolation
from benchmarks.report import Result
isolation.write(Path(sys.argv[2]), [Result("before", 1.0, "")])
{end}
"""


@pytest.mark.parametrize(("end", "why"), [("", None), ("os.kill(os.getpid(), signal.SIGSEGV)", "exit status -11"),
                                          ("time.sleep(60)", "did not end in")])  # fmt: skip
def test_what_a_part_measured_before_it_died_or_hung_is_kept(end: str, why: str | None):
    began = time.monotonic()
    results = isolation.run([sys.executable, "-c", PART.format(end=end)], "part", 60 if why != "did not end in" else 8)
    assert results[0] == Result("before", 1.0, "")
    assert [why in result.name for result in results[1:]] == ([True] if why else [])
    assert time.monotonic() - began < 50
    assert isolation.run([], "late", 0)[0].name == "late: failed (no time was left for it)"


def test_a_part_runs_as_the_whole_bench_starts_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(parts, "LOADS", {"step": lambda rounds: [("one", lambda: [Result("one", rounds, "")])]})
    out = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["bench_h200", "--part", "step", "--quick", "--out", str(out)])
    assert bench_h200.main() == 0
    assert json.loads(out.read_text())["value"] == bench_h200.QUICK_ROUNDS
    assert {part.split()[0] for part in parts.NAMES} == bench_h200.MOST_SECONDS.keys()
