"""What a process of the bench measures, load by load; a load that fails is named and the others still run."""

import gc
import sys
from collections.abc import Iterable, Iterator
from functools import partial

from benchmarks.h200 import attention, contenders, correctness, decode_step, int8, marks, torch_attention
from benchmarks.h200.bandwidth import read_bandwidth
from benchmarks.h200.isolation import attempt, failure
from benchmarks.h200.marks import Mark
from benchmarks.report import Result

NUM_WEIGHTS = 24
"""Of 16 MB each: together six times the L2."""
SHARDS = 6
"""Processes that share the cases of correctness: compiling is Python most of the time."""


def measured(part: str, rounds: int) -> Iterator[list[Result]]:
    """The results of a part, each list as soon as it is there. `part`: one of `NAMES`, or `correctness N`."""
    kind, _, number = part.partition(" ")
    if kind == "correctness":
        yield attempt(part, lambda: correct(int(number)))
        return
    for name, measure in LOADS[kind](rounds):
        yield attempt(name, measure)
        free()


def correct(shard: int) -> list[Result]:
    ran, wrong = correctness.failures(shard, SHARDS)
    print(correctness.names(wrong), file=sys.stderr)
    # At least one: a card that every case refuses is no pass.
    return [Result(f"correctness {shard}: cases right", ran - len(wrong), "", 1, better="higher"),
            Result(f"correctness {shard}: cases wrong", len(wrong), "", 0, 0)]  # fmt: skip


def decode_part(rounds: int):
    speed = read_bandwidth(rounds)
    name = f"read bandwidth, {contenders.card()}"
    yield name, lambda: [Result(name, speed / 1e12, "TB/s", better="higher")]
    for name, loads in marks.decode_loads().items():
        yield name, partial(decode_results, loads, rounds, speed)


def decode_results(loads: tuple[attention.Load, ...], rounds: int, speed: float) -> Iterable[Result]:
    """Our contenders, one a page size, in turns with each other and with the peers, who have no pages."""
    for load in loads:
        yield from unlike_xla(load)
    ours = {f"ours, pages of {load.page_size}": load for load in loads}
    racing = [attention.ours(load, name) for name, load in ours.items()]
    seconds = contenders.race([*racing, *peers(loads[0])], rounds)
    others = {name: times for name, times in seconds.items() if name not in ours}
    for name, load in ours.items():
        if marks.is_shared(load):
            share = load.kv_bytes / contenders.median(seconds[name]) / speed
            yield marks.share_of_decode(load).result(share)
        yield against(marks.speedup_of_decode(load), seconds[name], others)


def prefill_part(rounds: int):
    yield marks.PREFILL.name, lambda: prefill_results(rounds)
    yield f"{marks.PREFILL.name}, operands in registers", lambda: in_registers(rounds)


def prefill_results(rounds: int) -> Iterable[Result]:
    load = marks.PREFILL
    yield from unlike_xla(load)
    seconds = contenders.race([attention.ours(load, "ours"), *peers(load)], rounds)
    cudnn = {name: times for name, times in seconds.items() if "cudnn" in name.lower()}
    yield against(marks.SPEEDUP_OF_PREFILL, seconds["ours"], cudnn)
    for name, times in seconds.items():
        rate = load.causal_flops / contenders.median(times) / 1e12
        yield Result(f"{load.name}: rate of {name}", rate, "TFLOP/s", better="higher")


def in_registers(rounds: int) -> Iterable[Result]:
    """The form that is not the default before it has run on a card: its rows and its speed against the default's."""
    load = marks.PREFILL
    rows = attention.unlike(load, attention.prefill_in_registers, attention.public)
    yield Result(f"{load.name}: rows in which operands in registers differ", rows, "", 0, 0)
    racing = [attention.ours(load, "ours"), attention.ours(load, "fast", attention.prefill_in_registers)]
    ratio, _ = contenders.speedup(contenders.race(racing, rounds), "fast")
    yield Result(f"{load.name}: operands in registers against the default", ratio, "x", better="higher")


def int8_part(rounds: int):
    yield marks.SPEEDUP_OF_INT8.name, lambda: many_rows(rounds)
    speed = read_bandwidth(rounds)
    for rows in marks.SMALL_ROWS:
        for form in marks.FORMS:
            yield f"int8 matmul {rows} rows, {form}", partial(few_rows, rows, form, rounds, speed)


def many_rows(rounds: int) -> Iterable[Result]:
    ours = int8.ours(4096, NUM_WEIGHTS, None)
    seconds = contenders.race([ours, *int8.torch_int_mm(4096, NUM_WEIGHTS)], rounds)
    yield against(marks.SPEEDUP_OF_INT8, seconds.pop(ours.name), seconds)


def few_rows(rows: int, form: str, rounds: int, speed: float) -> Iterable[Result]:
    one = int8.ours(rows, NUM_WEIGHTS, None, quantize_activations=marks.FORMS[form])
    weight_bytes = NUM_WEIGHTS * int8.IN_FEATURES * int8.OUT_FEATURES
    seconds = contenders.median(contenders.race([one], rounds)[one.name])
    yield marks.share_of_int8(rows, form).result(weight_bytes / seconds / speed)


def step_part(rounds: int):
    speed = read_bandwidth(rounds)
    for rows in marks.STEP_ROWS:
        yield f"8B decode step, {rows} rows", partial(step_results, rows, rounds, speed)


def step_results(rows: int, rounds: int, speed: float) -> Iterable[Result]:
    step = decode_step.make(rows)
    seconds = contenders.median(contenders.race([step.contender], rounds)[step.contender.name])
    yield marks.share_of_step(rows).result(step.num_bytes / seconds / speed)


LOADS = {"decode": decode_part, "prefill": prefill_part, "int8": int8_part, "step": step_part}
NAMES = (*(f"correctness {shard}" for shard in range(SHARDS)), *LOADS)


def peers(load: attention.Load) -> list[contenders.Contender]:
    dense = attention.cudnn(load)
    return [*([dense] if dense else []), *torch_attention.contenders(load)]


def against(mark: Mark, ours: list[float], others: dict[str, list[float]]) -> Result:
    """The ratio to the fastest of the others; a failure where no peer ran: that is no pass."""
    if not others:
        return failure(mark.name, "no peer ran")
    return mark.result(*contenders.speedup({"ours": ours} | others, "ours"))


def unlike_xla(load: attention.Load) -> list[Result]:
    """Rows that differ; a failure where it cannot be told, so that the load is timed all the same."""
    name = f"{load.name}, pages of {load.page_size}: rows unlike XLA's"
    by_xla = partial(attention.public, implementation="xla")
    return attempt(name, lambda: [Result(name, attention.unlike(load, attention.public, by_xla), "", 0, 0)])


def free() -> None:
    """Gives torch's memory back to the card: jax asks for what it lacks."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.cuda.empty_cache()
