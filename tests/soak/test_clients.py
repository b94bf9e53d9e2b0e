"""What clients may do to a server: everything that they send, and every way to leave. One process of the demo model."""

import statistics

import pytest

pytest.importorskip("smg_grpc_proto", reason="needs smg-grpc-proto")

import hostile_load
import leaving_load
import mixed_load
import refused_load
from canary import Canary
from figures import Figures
from memory import memory_of, slope_of
from quiet import USED, check_all_rows, wait_idle
from server_process import ServerProcess

DEMO_OPTIONS = ("--max-waiting", "512", "--drain-seconds", "5")
MB = 1_000_000
MOST_PROMPT_TOKENS = 255
"""Of `server_process.SIZES`, with one of output."""


def test_hostile_requests(demo: ServerProcess, canary: Canary, beside, count, is_full: bool, figures: Figures):
    """Nothing ends but the request itself, always with a status that says whose fault it is."""
    warm = beside.submit(hostile_load.send, demo.address, 1, count(200, 5000), False).result()
    before, total = demo.memory(), count(1800, 100_000)
    with canary.beside() as paced:
        answers = beside.submit(hostile_load.send, demo.address, 2, total, is_full).result()
    wait_idle(demo)
    growth = (demo.memory() - before) / MB
    figures(requests=answers.codes.total(), deaths=int(demo.process.poll() is not None),
            INTERNAL=answers.codes["INTERNAL"], memory_growth_MB=growth, codes=dict(answers.codes),
            canary_answers=paced.answers, canary_p99_ms=paced.p99_ms(), canary_quiet_p99_ms=canary.quiet.p99_ms())
    assert demo.process.poll() is None
    assert not warm.unexpected and not answers.unexpected, "\n".join(warm.unexpected + answers.unexpected)
    assert answers.codes.total() == total
    assert {"OK", "INVALID_ARGUMENT", "UNIMPLEMENTED"} <= answers.codes.keys()
    assert growth < 50
    check_all_rows(demo)


def test_refusals(demo: ServerProcess, beside, count, is_full: bool, figures: Figures):
    """Prompts of one token more than can run, far too long ones and bytes that are no text: named, and at once."""
    seconds, problems = beside.submit(refused_load.send, demo.address, MOST_PROMPT_TOKENS, count(2, 100)).result()
    p99 = statistics.quantiles(seconds, n=100)[98] * 1000
    figures(refused=len(seconds), p99_ms=p99, slowest_ms=max(seconds) * 1000)
    assert not problems, "\n".join(problems[:10])
    if is_full:
        assert p99 < 50
    wait_idle(demo)


def test_disconnects(demo: ServerProcess, canary: Canary, beside, count, is_full: bool, figures: Figures):
    """However a client leaves, its rows and pages are given back."""
    total = count(500, 10_000)
    with canary.beside() as paced:
        answers, ways = beside.submit(leaving_load.leave, demo.address, 3, total, is_full).result()
    seconds = wait_idle(demo)
    found = demo.metrics()
    figures(calls=ways.total(), ways=dict(ways), codes=dict(answers.codes), idle_after_s=seconds,
            pages_held=int(found[USED]),
            idle_leaks=int(found["jaxinfer_idle_leaks_total"]), canary_answers=paced.answers,
            canary_p99_ms=paced.p99_ms(), canary_quiet_p99_ms=canary.quiet.p99_ms())
    assert not answers.unexpected, "\n".join(answers.unexpected)
    assert ways.total() >= total and len(ways) == 4
    assert {"CANCELLED", "DEADLINE_EXCEEDED"} <= answers.codes.keys()
    check_all_rows(demo)


def test_mixed_load(demo: ServerProcess, canary: Canary, beside, count, is_full: bool, figures: Figures):
    """A while of everything: no status that nobody asked for, nothing compiled, memory stays."""
    seconds = count(6, 3600)
    with canary.beside() as paced, memory_of(demo) as samples:
        answers = beside.submit(mixed_load.mix, demo.address, 4, seconds, is_full).result()
    wait_idle(demo)
    compiles = int(demo.metrics()["jaxinfer_compiles_after_ready_total"])
    half = samples[len(samples) // 2:]
    slope = slope_of(half) / MB * 60
    figures(seconds=seconds, requests=answers.codes.total(), codes=dict(answers.codes), compiles_after_ready=compiles,
            memory_slope_MB_a_minute=slope, canary_answers=paced.answers, canary_p99_ms=paced.p99_ms(),
            canary_quiet_p99_ms=canary.quiet.p99_ms())
    assert not answers.unexpected, "\n".join(answers.unexpected)
    assert compiles == 0
    assert answers.codes["OK"] > seconds
    if is_full:
        assert slope < 1, f"{slope:.2f} MB a minute in the second half"
    check_all_rows(demo)
