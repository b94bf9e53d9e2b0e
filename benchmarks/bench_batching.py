"""What continuous batching gives: 256 requests at once on the demo model, in bfloat16, 64 rows, greedy.

Prompts (random ids) and outputs are 8 to 256 tokens, log-uniform; outputs have their exact lengths (ignore_eos). All
contenders go through `LLM.generate`, so intake, both threads and detokenising are in their times:

    continuous   all 256 requests at once
    device       the compiled programs of that very run, back to back on inputs that lie on the device; same tokens
    static       64 requests at a time, each computed until the longest of them has ended, as a batch's `generate`
                 elsewhere does; what a request computes beyond its own length does not count as generated
    waves        64 requests at a time; one that ends leaves the batch, and the next 64 begin when all have ended
    full width   the bare programs of the waves, always those of 64 rows: rows that ended stand empty
    one row      an engine of one row, a smaller load of the same mix, one request after the other
"""

import random
import statistics
import sys
import time
from dataclasses import dataclass

from benchmarks.replay import Recorder, Replay, Steps
from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import interleaved, is_quick, log_uniform, median_ratio, random_prompt
from jaxinfer import LLM, SamplingParams
from jaxinfer.engine import Engine


@dataclass(frozen=True, slots=True)
class Size:
    """few_rows, num_alone: rows and requests of the one-row engine. rounds: of measuring."""

    model: str
    num_requests: int
    num_rows: int
    few_rows: int
    num_alone: int
    rounds: int
    max_num_batched_tokens: int


FULL = Size("demo", 256, 64, 1, 32, 5, 2048)
QUICK = Size("demo-draft", 6, 2, 2, 2, 1, 8)  # equal engines compile once


def new_llm(size: Size, num_rows: int) -> LLM:
    """Pages for the longest request in every row, so that the plans are the same on every machine."""
    return LLM(size.model, dtype="bfloat16", max_num_seqs=num_rows, num_pages=max(num_rows * 32, 256),
               max_num_batched_tokens=size.max_num_batched_tokens, quiet=True)


class Load:
    """Requests of fixed lengths; every run gets new ids, so that nothing is found in the prefix cache."""

    def __init__(self, num_requests: int, seed: int):
        self._rng = random.Random(seed)
        self._prompts = log_uniform(num_requests, self._rng)
        self._outputs = log_uniform(num_requests, self._rng)

    @property
    def num_tokens(self) -> int:
        """Tokens generated in a run."""
        return sum(self._outputs)

    def run(self, llm: LLM, at_once: int, together: bool = False) -> float:
        """Seconds for all requests, `at_once` of them at a time; `together`: all of these as long as the longest."""
        prompts = [random_prompt(length, self._rng) for length in self._prompts]
        began = time.perf_counter()
        for first in range(0, len(prompts), at_once):
            last = first + at_once
            lengths = self._outputs[first:last]
            if together:
                lengths = [max(lengths)] * len(lengths)
            llm.generate(prompts[first:last], [exactly(length) for length in lengths], use_tqdm=False)
        return time.perf_counter() - began


def exactly(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


class Contest:
    """The contenders, and what their latest runs did."""

    def __init__(self, llm: LLM, alone: LLM, size: Size):
        self._llm, self._alone, self._size = llm, alone, size
        self.load = Load(size.num_requests, seed=0)
        self.small_load = Load(size.num_alone, seed=1)
        self.steps: dict[str, Steps] = {}
        self.waited: list[float] = []
        self._recorder: Recorder = llm.core.engine.run(record)
        self._replay = Replay(self._recorder.runner)
        self._full_width = Replay(self._recorder.runner, full_width=True)

    def warm_up(self) -> None:
        """Runs everything once, and checks that the replay computes the very tokens of the run."""
        self.continuous()
        self._llm.core.engine.run(lambda _: self._replay.seconds(self._recorder.plans, self._recorder.results))
        self.static()
        self.waves()
        self.full_width()
        self.one_row()

    def continuous(self) -> float:
        self._recorder.forget()
        seconds = self.load.run(self._llm, at_once=self._size.num_requests)
        self.steps["continuous"] = Steps.of(self._recorder.plans)
        self.waited.append(self._recorder.waited)
        return seconds

    def device(self) -> float:
        """Follows `continuous`."""
        return self._llm.core.engine.run(lambda _: self._replay.seconds(self._recorder.plans))

    def static(self) -> float:
        return self._recorded("static", together=True)

    def waves(self) -> float:
        return self._recorded("waves")

    def full_width(self) -> float:
        """Follows `waves`."""
        return self._llm.core.engine.run(lambda _: self._full_width.seconds(self._recorder.plans))

    def _recorded(self, name: str, together: bool = False) -> float:
        self._recorder.forget()
        seconds = self.load.run(self._llm, at_once=self._size.num_rows, together=together)
        self.steps[name] = Steps.of(self._recorder.plans)
        return seconds

    def one_row(self) -> float:
        """One request after the other: as nobody waits, the engine fuses decode rounds."""
        return self.small_load.run(self._alone, at_once=1)


def record(engine: Engine) -> Recorder:
    """Puts a recorder before the engine's executor."""
    recorder = Recorder(engine.runner)  # type: ignore[arg-type]
    engine.runner = recorder
    return recorder


def results(contest: Contest, seconds: dict[str, list[float]]) -> list[Result]:
    tokens = dict.fromkeys(seconds, contest.load.num_tokens) | {"one row": contest.small_load.num_tokens}
    rates = {name: [tokens[name] / one for one in times] for name, times in seconds.items()}
    continuous = rates["continuous"]
    return [
        Result("share of the device limit", median_ratio(continuous, rates["device"]), "", 0.80, 0.92, "higher"),
        Result("tokens/s over one row's", median_ratio(continuous, rates["one row"]), "x", 2.5, 4.0, "higher"),
        Result("tokens/s over static batches'", median_ratio(continuous, rates["static"]), "x", 1.5, 2.0, "higher"),
        Result("tokens/s over waves'", median_ratio(continuous, rates["waves"]), "x", better="higher"),
        Result("tokens/s over waves' at full width", median_ratio(continuous, rates["full width"]), "x",
               better="higher"),
        *(Result(f"{name}: generated tokens", statistics.median(found), "1/s", better="higher")
          for name, found in rates.items()),
        *details(contest, seconds["continuous"]),
    ]


def details(contest: Contest, seconds: list[float]) -> list[Result]:
    """What the runs consisted of."""
    busy = [whole - idle for whole, idle in zip(seconds, contest.waited[-len(seconds):], strict=True)]
    found = [Result("continuous: seconds", statistics.median(seconds), "s"),
             Result("continuous: of which not waiting for the device", statistics.median(busy), "s")]
    for name, steps in contest.steps.items():
        found += [Result(f"{name}: steps with prompts", steps.prefills, ""),
                  Result(f"{name}: steps without prompts", steps.decodes, ""),
                  Result(f"{name}: decode rounds in these", steps.rounds, ""),
                  Result(f"{name}: mean rows a decode round", steps.rows / max(steps.rounds, 1), "", better="higher")]
    return found


def main() -> int:
    size = QUICK if is_quick(__doc__) else FULL
    with new_llm(size, size.num_rows) as llm, new_llm(size, size.few_rows) as alone:
        contest = Contest(llm, alone, size)
        contest.warm_up()
        seconds = interleaved(size.rounds, {"continuous": contest.continuous, "device": contest.device,
                                            "static": contest.static, "waves": contest.waves,
                                            "full width": contest.full_width, "one row": contest.one_row})
        found = results(contest, seconds)
    report("batching", found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
