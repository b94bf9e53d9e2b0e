"""Does anything compile, leak or stall in two minutes of everything at once?

One engine on the demo target under random requests of every kind: greedy and sampled, seeds, n, log-probabilities of
output and prompt, stop strings and ids, minimum lengths, shared prefixes, priorities, cancels, more rows than slots,
fewer pages than rows want.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from contextlib import closing

from benchmarks.report import Result, exit_code, report
from jaxinfer import LLM, SamplingParams

FULL = {"model": "demo", "max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 512, "num_pages": 220}
QUICK = {"model": "demo-draft", "dtype": "bfloat16", "max_num_seqs": 2, "max_num_batched_tokens": 8, "num_pages": 256}
"""The programs of the smoke runs of `bench_batching` and `bench_prefix`."""
BATCH = 24


def main() -> int:
    """Runs for --seconds and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--quick", action="store_true", help="one second, a small model")
    options = parser.parse_args()
    seconds = 1.0 if options.quick else options.seconds
    with LLM(**(QUICK if options.quick else FULL), quiet=True) as llm:
        rounds, tokens = load(llm, seconds)
        metrics = llm.metrics()
        held = llm.core.engine.run(lambda engine: engine.scheduler.pool.num_held)
        llm.core.engine.run(lambda engine: engine.scheduler.check_invariants())
    results = [
        Result("compiles after ready", metrics["compiles_after_ready"], "programs", floor=0, goal=0, better="lower"),
        Result("pages held when idle", held, "pages", floor=0, goal=0, better="lower"),
        Result("failed steps", metrics["failed_steps"], "steps", floor=0, goal=0, better="lower"),
        Result("preemptions", metrics["preemptions"], "rows"),
        Result("prefix hit rate", metrics["prefix_hit_rate"], "share"),
        Result("requests", rounds * BATCH, "requests"),
        Result("output", tokens / seconds, "tokens/s"),
    ]
    report("mixed_load", results)
    return exit_code(results)


def load(llm: LLM, seconds: float) -> tuple[int, int]:
    """Batches of random requests, some streams closed on the way, until the time is over: (batches, tokens)."""
    rng, end = random.Random(0), time.monotonic() + seconds
    rounds = tokens = 0
    while time.monotonic() < end:
        prompts = list(random_prompts(rng, llm.core.info.vocab_size))
        params = [random_params(rng) for _ in prompts]
        outputs = llm.generate(prompts, params, use_tqdm=False, priority=rng.choice([0, 1]))
        tokens += sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        with closing(llm.stream(prompts[0], SamplingParams(max_tokens=100, ignore_eos=True))) as stream:
            next(stream)
        rounds += 1
    return rounds, tokens


def random_prompts(rng: random.Random, vocab_size: int) -> Iterator[list[int]]:
    """Half of them begin like another one."""
    shared = [[rng.randrange(vocab_size) for _ in range(100)] for _ in range(2)]
    for _ in range(BATCH):
        head = rng.choice([*shared, [], []])
        yield head + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 200))]


def random_params(rng: random.Random) -> SamplingParams:
    """Any combination of fields."""
    max_tokens = rng.randint(1, 120)
    return SamplingParams(
        max_tokens=max_tokens, min_tokens=rng.choice([0, 0, min(5, max_tokens)]), n=rng.choice([1, 1, 1, 3]),
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]), top_k=rng.choice([0, 0, 1, 50]),
        top_p=rng.choice([1.0, 1.0, 0.9]), min_p=rng.choice([0.0, 0.0, 0.1]), seed=rng.choice([None, 1, -7]),
        logprobs=rng.choice([None, None, 0, 5]),
        prompt_logprobs=rng.choice([None, None, None, 2]), stop=rng.choice([None, None, ["self"], ["\n\n", "def "]]),
        stop_token_ids=rng.choice([None, None, [17, 300]]), ignore_eos=rng.choice([True, False]))


if __name__ == "__main__":
    sys.exit(main())
