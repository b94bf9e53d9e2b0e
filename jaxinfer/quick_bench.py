"""`jaxinfer bench`: how fast a model answers random prompts that all come at once."""

import dataclasses
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxinfer.errors import InvalidConfig
from jaxinfer.types import RequestStats, SamplingParams

if TYPE_CHECKING:
    from jaxinfer.offline import LLM

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the model; lengths are tokens."""

    num_prompts: int
    input_len: int
    output_len: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InvalidConfig(field.name, "must be at least 1, got 0")


@dataclass(frozen=True, slots=True)
class Result:
    """Times are seconds, one a quantile.

    ttft: from arrival to the first token. itl: mean time between a request's tokens.
    """

    load: Load
    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    ttft: tuple[float, ...]
    itl: tuple[float, ...]

    @property
    def output_rate(self) -> float:
        """Generated tokens a second, all requests together."""
        return self.num_output_tokens / self.seconds

    @property
    def total_rate(self) -> float:
        """Prompt and generated tokens a second."""
        return (self.num_prompt_tokens + self.num_output_tokens) / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"output_rate": self.output_rate, "total_rate": self.total_rate}

    def table(self) -> str:
        load = self.load
        names = "".join(f"{f'p{quantile * 100:g}':>10}" for quantile in QUANTILES)
        return "\n".join((
            f"{load.num_prompts} prompts of {load.input_len} tokens, {load.output_len} out each: {self.seconds:.2f} s",
            f"{self.output_rate:,.0f} output tokens/s, {self.total_rate:,.0f} tokens/s with the prompts'",
            f"{'':<24}{names}",
            f"{'first token, ms':<24}" + "".join(f"{value * 1e3:>10.1f}" for value in self.ttft),
            f"{'between tokens, ms':<24}" + "".join(f"{value * 1e3:>10.2f}" for value in self.itl),
        ))  # fmt: skip


def run(llm: "LLM", load: Load) -> Result:
    """Sends all prompts at once, after one short request that warms what is not compiled."""
    numbers = random.Random(0)  # noqa: S311 (the same prompts every time)
    vocab_size = llm.core.info.vocab_size
    prompts = [[numbers.randrange(vocab_size) for _ in range(load.input_len)] for _ in range(load.num_prompts)]
    params = SamplingParams(temperature=0.0, max_tokens=load.output_len, ignore_eos=True, detokenize=False)
    llm.generate([[0]], dataclasses.replace(params, max_tokens=1), use_tqdm=False)
    began = time.monotonic()
    outputs = llm.generate(prompts, params)
    seconds = time.monotonic() - began
    return summary(load, seconds, [output.metrics for output in outputs if output.metrics is not None])


def summary(load: Load, seconds: float, stats: Sequence[RequestStats]) -> Result:
    waits = [one.first_token - one.arrival for one in stats]
    several = [one for one in stats if one.num_output_tokens > 1]
    gaps = [(one.finished - one.first_token) / (one.num_output_tokens - 1) for one in several]
    return Result(
        load=load,
        seconds=seconds,
        num_prompt_tokens=sum(one.num_prompt_tokens for one in stats),
        num_output_tokens=sum(one.num_output_tokens for one in stats),
        ttft=quantiles(waits),
        itl=quantiles(gaps),
    )


def quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest-rank quantiles; zeros when there is nothing."""
    ordered = sorted(values)
    return tuple(ordered[round(quantile * (len(ordered) - 1))] if ordered else 0.0 for quantile in QUANTILES)
