"""The kernel part of `make aot`: what it compiles, and that its checks find what they are there for."""

import time
from dataclasses import replace
from pathlib import Path
from subprocess import TimeoutExpired

import pytest

from benchmarks.aot import jobs
from benchmarks.aot.cases import CASES
from benchmarks.aot.kernel_checks import Found, Sizes, complaints, table
from benchmarks.aot.kernels import KernelProgram, programs
from pallas_kernels import tuning
from pallas_kernels.aot.measure import LoopFigures, Measured
from pallas_kernels.aot.memory import Copy, Memory
from pallas_kernels.aot.ptxas import Kernel
from pallas_kernels.aot.toolchain import JobFailed
from pallas_kernels.chips import CHIPS

ATTENTION = next(each for each in programs("v6e") if each.kernel == "attention, decode")
DOT = next(each for each in programs("v6e") if each.kernel == "int8 matmul, weights and activations")
PAGES, GUARDED = Sizes.of(ATTENTION).donated, Sizes.of(ATTENTION).guarded
MEMORY = Memory(arguments=0, outputs=0, temporaries=1000, aliased=PAGES, code=0)


def loop(kernel: str, spilling: float, fill: float = 0.0) -> LoopFigures:
    return LoopFigures(kernel, 100, 1, 50, spilling, 0, fill)


def copied(num_bytes: int) -> Copy:
    return Copy("copy.1", "copy", "main", num_bytes, "bf16[8]")


def assembled(spill_stores: int) -> Kernel:
    return Kernel("mosaic_gpu_kernel", "sm_90a", 128, 0, spill_stores, spill_stores, 0)


OURS = (loop("ragged_paged_attention.1", 0.05), loop("fusion.3", 0.9))
GOOD = Found(ATTENTION, Measured({}, memory=MEMORY, loops=OURS))
GPU = Found(
    replace(ATTENTION, target="h200:1"),
    Measured({}, memory=MEMORY, kernels=(assembled(0), replace(assembled(8), name="x"))),
)


def changed(found: Found, **changes) -> Found:
    return replace(found, measured=replace(found.measured, **changes))


def test_a_good_call_passes_and_loops_of_xla_do_not_count():
    assert complaints(GOOD) == complaints(GPU) == []
    first, second = table([GOOD, GPU]).splitlines()[2:]
    assert first == "| attention, decode | v6e:1 | 1 of 1 | 5.0% | - | 0 | 1 of 1 | 0 |"
    assert second == "| attention, decode | h200:1 | 1 of 1 | 0 B | 128 | 0 | 1 of 1 | 0 |"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Found(ATTENTION, Measured({}, error="JaxRuntimeError: vmem exceeded\nmore")), "vmem exceeded"),
        (changed(GOOD, loops=(loop("attend_many.2", 0.051),)), "attend_many.2 spills in 5.1%"),
        (Found(DOT, Measured({}, memory=MEMORY, loops=(loop("int8_matmul", 0.082),))), "int8_matmul spills in 8.2%"),
        (changed(GOOD, loops=(loop("fusion", 0.0),)), "no kernel"),
        (changed(GOOD, memory=replace(MEMORY, aliased=PAGES - 1)), "lie in donated arguments"),
        (changed(GOOD, memory=replace(MEMORY, temporaries=Sizes.of(ATTENTION).allowed + 1)), "temporaries of"),
        (changed(GOOD, copies=(copied(GUARDED), copied(GUARDED - 1))), f"copies {GUARDED:,} B"),
        (changed(GPU, kernels=(assembled(4),)), "ptxas spills 4 B"),
    ],
)
def test_a_bad_call_is_named(found, words):
    (complaint,) = complaints(found)
    assert words in complaint
    assert table([found]).splitlines()[-1].endswith("| 1 |")


def test_queries_in_float32_may_be_as_large_as_the_pages_of_a_layer():
    """By their dimensions: as many elements in another shape are a copy of pages."""
    num_tokens, num_heads, width = ATTENTION.arguments["num_rows"], ATTENTION.arguments["num_q_heads"], 128
    queries = replace(copied(GUARDED), shape=f"f32[{num_tokens},{num_heads},{width}]{{2,0,1:T(8,128)}}")
    assert complaints(changed(GOOD, copies=(queries,))) == []
    other = replace(queries, shape=f"f32[{num_tokens * num_heads},{width}]")
    assert len(complaints(changed(GOOD, copies=(queries, other)))) == 1


def test_every_tuned_entry_is_compiled():
    compiled = [each.arguments for where in CHIPS for each in programs(where) if "tuned" in each.group]
    files = sorted((Path(tuning.__file__).parent / tuning.FOLDER).glob("*.json"))
    assert files
    for file in files:
        for entry in tuning.read(file.stem):
            wanted = {"operation": file.stem, "key": dict(entry.key), "blocks": dict(entry.blocks)}
            assert wanted in compiled, entry


@pytest.mark.parametrize("where", CHIPS)
def test_each_chip_has_every_form_width_and_page_dtype(where):
    attention = [each.arguments for each in programs(where) if each.operation == "ragged_paged_attention"]
    found = {(each["q_len"], each["head_dim"], each["kv_dtype"]) for each in attention}
    dtypes = ("bfloat16", "int8", "float8_e4m3fn")
    assert found == {(q, width, dtype) for q in (1, 5, 256) for width in (64, 128, 256) for dtype in dtypes}
    matmuls = [each.arguments for each in programs(where) if each.operation == "int8_matmul"]
    assert {(each["num_rows"], each["quantize_activations"]) for each in matmuls} == {
        (rows, activations) for rows in (32, 160, 2048) for activations in (True, False)
    }


def test_heads_are_those_of_the_models_shards():
    def heads(where: str) -> set[tuple[int, int]]:
        shards = (each for each in programs(where) if "widths" not in each.group)
        return {(each.arguments["num_q_heads"], each.arguments["num_kv_heads"])
                for each in shards if each.kernel == "attention, decode"}  # fmt: skip

    assert heads("v5e") == {(32, 8), (8, 2), (8, 1)}
    assert heads("v5p") == {(32, 8), (16, 2)}
    assert heads("h200") == {(32, 8), (64, 8)}
    assert {case.target.partition(":")[0] for case in CASES} == set(CHIPS)


def test_jobs_hold_each_call_once_and_are_chosen_by_name():
    for where in ("v5e", "h200"):
        everything = list(jobs.kernel_jobs(where, lambda name: True))
        assert sum(job.units for job in everything) == len(programs(where))
        assert max(job.units for job in everything) <= jobs.A_PROCESS
    (tuned, *_) = jobs.kernel_jobs("v6e", lambda name: "kernels-tuned" in name)
    assert tuned.name == "kernels-tuned-int8_matmul-v6e:1"
    assert list(jobs.kernel_jobs("v6e", lambda name: "8b-bf16" in name)) == []


def test_results_are_in_the_order_of_the_jobs_and_each_is_told(capsys):
    some = [jobs.Job(f"job {each}", 1, lambda each=each: each, lambda each: ["bad"] * each) for each in range(5)]
    assert jobs.run(some) == [0, 1, 2, 3, 4]
    told = capsys.readouterr().err
    assert "job 0 (1): 0 s, good" in told and "job 3 (1): 0 s, 3 complaints" in told


@pytest.mark.parametrize("failure", [JobFailed("job", "no result", "killed", ""), TimeoutExpired("job", 600)])
def test_a_process_that_fails_is_a_failure_of_each_of_its_calls_and_of_its_case(monkeypatch, failure):
    def failing(*arguments, **options):
        raise failure

    monkeypatch.setattr(jobs.toolchain, "run", failing)
    assert jobs.compile_step(CASES[0], every=True) == {"failure": str(failure)}
    monkeypatch.setattr(jobs.measure, "measure", failing)
    some = [ATTENTION, ATTENTION]
    assert [complaints(each) for each in jobs.compile_kernels(some)] == [
        [f"did not compile: {failure}"]] * 2  # fmt: skip


def test_a_defect_ends_the_run(monkeypatch):
    begun = []

    def broken():
        raise KeyError("defect")

    first = jobs.Job("broken", 1, broken, list)
    with pytest.raises(KeyError, match="defect"):
        jobs.run([first, *[jobs.Job("slow", 1, lambda: begun.append(time.sleep(0.05)), list)] * 100])
    assert len(begun) < 50, "what had not begun is left"


def test_an_operation_that_the_tool_does_not_know_is_a_failure_and_not_left_out():
    unknown = KernelProgram(
        "kernels-tuned-v6e:1", "v6e:1", "tuned blocks of x", "tuned", {"operation": "x", "key": {}, "blocks": {}}
    )
    found = Found(unknown, Measured({}, error="KeyError: 'x'"))
    assert complaints(found) == ["did not compile: KeyError: 'x'"] and table([found])
