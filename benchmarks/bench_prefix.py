"""What the prefix cache gives: prompts of 2,048 tokens that share their first 1,843, on the demo model in bfloat16.

The same engine with prefix caching and without it, in turns. Every round has a new shared beginning and new endings, so
nothing of one round is found in another.

    first token   one request after the other, one token each. The beginning is warm: an earlier request brought it.
    tokens/s      32 requests at once, 16 tokens each, greedy. Nothing is warm: filling the cache is timed too.
"""

import random
import statistics
import sys
import time
from dataclasses import dataclass

from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import interleaved, is_quick, median_ratio, random_prompt
from jaxinfer import LLM, SamplingParams

SHARED, WHOLE = 1843, 2048
OUTPUT = 16


@dataclass(frozen=True, slots=True)
class Size:
    """num_single: requests one after the other. num_batch: requests at once. rounds: of measuring."""

    model: str
    shared: int
    whole: int
    num_single: int
    num_batch: int
    rounds: int
    max_num_batched_tokens: int


FULL, QUICK = Size("demo", SHARED, WHOLE, 6, 32, 5, 2048), Size("demo-draft", 100, 128, 1, 2, 1, 8)


def new_llm(size: Size, cached: bool) -> LLM:
    """Pages for every request of a batch with nothing shared, so that neither side ever lacks any."""
    num_pages = max(256, size.num_batch * (2 + (size.whole + OUTPUT) // 16))
    return LLM(size.model, dtype="bfloat16", max_num_seqs=size.num_batch, num_pages=num_pages, quiet=True,
               max_num_batched_tokens=size.max_num_batched_tokens, enable_prefix_caching=cached)


class Side:
    """One of the two engines."""

    def __init__(self, llm: LLM, size: Size):
        self._llm, self._size = llm, size
        self._rng = random.Random(0)  # both sides get the same prompts

    def prompts(self, count: int) -> list[list[int]]:
        """Prompts with a new beginning in common."""
        beginning = random_prompt(self._size.shared, self._rng)
        return [beginning + random_prompt(self._size.whole - self._size.shared, self._rng) for _ in range(count)]

    def first_token(self) -> float:
        """Mean seconds to the first token."""
        first, *rest = self.prompts(1 + self._size.num_single)
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        self._llm.generate([first], params, use_tqdm=False)
        began = time.perf_counter()
        for prompt in rest:
            self._llm.generate([prompt], params, use_tqdm=False)
        return (time.perf_counter() - began) / len(rest)

    def batch(self) -> float:
        """Generated tokens a second."""
        prompts = self.prompts(self._size.num_batch)
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
        began = time.perf_counter()
        self._llm.generate(prompts, params, use_tqdm=False)
        return len(prompts) * OUTPUT / (time.perf_counter() - began)


def results(found: dict[str, list[float]], hit_rate: float) -> list[Result]:
    def median(name: str, unit: str, factor: float = 1.0) -> Result:
        return Result(name, statistics.median(found[name]) * factor, unit, better="lower" if unit == "ms" else "higher")

    first = median_ratio(found["first token, no cache"], found["first token, cache"])
    rate = median_ratio(found["tokens/s, cache"], found["tokens/s, no cache"])
    return [
        Result("time to first token, no cache / cache", first, "x", 2.7, 6.0, "higher"),
        Result("tokens/s, cache / no cache", rate, "x", 2.0, 4.0, "higher"),
        median("first token, cache", "ms", 1e3), median("first token, no cache", "ms", 1e3),
        median("tokens/s, cache", "1/s"), median("tokens/s, no cache", "1/s"),
        Result("share of prompt tokens found in the cache", hit_rate, "", better="higher"),
    ]


def main() -> int:
    size = QUICK if is_quick(__doc__) else FULL
    with new_llm(size, True) as with_cache, new_llm(size, False) as without:
        cache, no_cache = Side(with_cache, size), Side(without, size)
        for side in (cache, no_cache):  # the first calls of a process are slower
            side.first_token()
        found = interleaved(size.rounds, {
            "first token, cache": cache.first_token, "first token, no cache": no_cache.first_token,
            "tokens/s, cache": cache.batch, "tokens/s, no cache": no_cache.batch})
        hit_rate = with_cache.metrics()["prefix_hit_rate"]
    shown = results(found, hit_rate)
    report("prefix", shown)
    return exit_code(shown)


if __name__ == "__main__":
    sys.exit(main())
