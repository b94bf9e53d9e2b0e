"""The kernels on an NVIDIA H200: correctness first, then speed beside torch and cuDNN in the same process.

Without an H200 it says so, every value is null, and it exits with 0. Shares refer to what a plain read reaches; ratios
are medians over rounds in which the contenders take turns.
"""

import os
import sys
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory on the same card

import jax

from benchmarks.h200 import attention, bandwidth, contenders, correctness, decode_step, int8, torch_attention
from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import is_quick

ROUNDS = 15
SMALL_ROWS = (1, 8, 64)
NUM_WEIGHTS = 24
"""Of 16 MB each: together six times the L2."""


def decode_loads(num_layers: int) -> list[attention.Load]:
    """Every load's pages are many times the L2, so that a pass reads memory."""
    uniform, ragged = (4096,) * 32, attention.ragged_lens(32, 4096)
    return [
        attention.decode(f"decode 32 x 4096{name}, pages of {page_size}", lens, page_size, num_layers)
        for page_size in (16, 64) for name, lens in (("", uniform), (" ragged", ragged))
    ]  # fmt: skip


def measure_decode(rounds: int, read_bandwidth: float) -> list[Result]:
    found = []
    for load in decode_loads(num_layers=8):
        seconds = contenders.race(attention_contenders(load), rounds)
        share = load.kv_bytes / median(seconds["gpu"]) / read_bandwidth
        ratio, best = contenders.speedup(seconds, "gpu")
        found += [
            Result(f"{load.name}: share of read bandwidth", share, "", 0.80, 0.90, "higher"),
            Result(f"{load.name}: against {best}", ratio, "x", 1.0, 1.15, "higher"),
        ]
    load = attention.decode("decode 1 x 1024, pages of 64", (1024,), 64, num_layers=64)
    ratio, best = contenders.speedup(contenders.race(attention_contenders(load), rounds), "gpu")
    return [*found, Result(f"{load.name}: against {best}", ratio, "x", 1.0, 1.5, "higher")]


def measure_prefill(rounds: int) -> list[Result]:
    load = attention.Load("prefill 8192 causal, pages of 64", (8192,), (8192,), 64, num_layers=4)
    seconds = contenders.race(attention_contenders(load), rounds)
    cudnn = {name: times for name, times in seconds.items() if name == "gpu" or "cudnn" in name.lower()}
    ratio, best = contenders.speedup(cudnn, "gpu")
    return [
        Result(f"{load.name}: against {best}", ratio, "x", 0.90, 1.03, "higher"),
        Result(f"{load.name}: rate", load.causal_flops / median(seconds["gpu"]) / 1e12, "TFLOP/s", better="higher"),
    ]


def attention_contenders(load: attention.Load) -> list[contenders.Contender]:
    dense = attention.cudnn(load)
    return [attention.ours(load, "gpu"), *([dense] if dense else []), *torch_attention.contenders(load)]


def measure_int8(rounds: int, read_bandwidth: float) -> list[Result]:
    ours = int8.ours(4096, NUM_WEIGHTS, None)
    seconds = contenders.race([ours, *int8.torch_int_mm(4096, NUM_WEIGHTS)], rounds)
    ratio, best = contenders.speedup(seconds, ours.name)
    found = [Result(f"int8 matmul 4096 rows, quantisation included: against {best}", ratio, "x", 1.0, 1.25, "higher")]
    weight_bytes = NUM_WEIGHTS * int8.IN_FEATURES * int8.OUT_FEATURES
    for rows in SMALL_ROWS:
        for quantize, form in ((True, "W8A8"), (False, "weight-only")):
            one = int8.ours(rows, NUM_WEIGHTS, None, quantize_activations=quantize)
            seconds = contenders.race([one], rounds)
            share = weight_bytes / median(seconds[one.name]) / read_bandwidth
            name = f"int8 matmul {rows} rows, {form}: share of read bandwidth"
            found.append(Result(name, share, "", 0.70, 0.88, "higher"))
    return found


def measure_decode_step(rounds: int, read_bandwidth: float) -> list[Result]:
    found = []
    for rows in (1, 32):
        step = decode_step.make(rows)
        share = step.num_bytes / median(contenders.race([step.contender], rounds)[step.contender.name]) / read_bandwidth
        found.append(Result(f"8B decode step, {rows} rows: share of read bandwidth", share, "", 0.80, 0.93, "higher"))
    return found


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def unmeasured() -> list[Result]:
    """The table of a machine without an H200."""
    names = [(f"{load.name}: share of read bandwidth", 0.80, 0.90) for load in decode_loads(1)]
    names += [(f"{load.name}: against the best peer", 1.0, 1.15) for load in decode_loads(1)]
    names += [
        ("decode 1 x 1024, pages of 64: against the best peer", 1.0, 1.5),
        ("prefill 8192 causal, pages of 64: against cuDNN", 0.90, 1.03),
        ("int8 matmul 4096 rows, quantisation included: against torch", 1.0, 1.25),
        *((f"int8 matmul {rows} rows: share of read bandwidth", 0.70, 0.88) for rows in SMALL_ROWS),
        *((f"8B decode step, {rows} rows: share of read bandwidth", 0.80, 0.93) for rows in (1, 32)),
    ]
    return [Result(name, None, "x" if "against" in name else "", floor, goal, "higher") for name, floor, goal in names]


def main() -> int:
    quick = is_quick(__doc__)
    device = jax.devices()[0]
    if "H200" not in device.device_kind:
        print(f"skipped: this is {device.platform} {device.device_kind}, not an NVIDIA H200; nothing was measured")
        report("h200", unmeasured())
        return 0
    ran, wrong = correctness.failures()
    print(f"correctness: {ran - len(wrong)} of {ran} cases right\n{correctness.names(wrong)}")
    rounds = 2 if quick else ROUNDS
    speed = bandwidth.read_bandwidth(rounds)
    found = [
        Result("correctness: cases wrong", len(wrong), "", 0, 0),
        Result("read bandwidth", speed / 1e12, "TB/s", better="higher"),
    ]
    parts: list[Callable[[], list[Result]]] = [
        lambda: measure_decode(rounds, speed),
        lambda: measure_prefill(rounds),
        lambda: measure_int8(rounds, speed),
        lambda: measure_decode_step(rounds, speed),
    ]
    for part in parts:
        found += part()
    report("h200", found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
