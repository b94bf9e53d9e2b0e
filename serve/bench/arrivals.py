"""When requests arrive: a renewal process with gamma gaps. Pure."""

import itertools
import math
import random


def arrivals(num: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start, one a request, in order. rate: requests a second; inf: all at 0.

    The gaps have mean 1 / rate and coefficient of variation 1 / sqrt(burstiness); 1 is a Poisson process, inf a clock.
    They are scaled so that the last request arrives at num / rate exactly: what was asked for is what is offered, with
    every seed. `vllm bench serve` does the same.
    """
    if math.isinf(rate):
        return [0.0] * num
    if math.isinf(burstiness):
        return [(number + 1) / rate for number in range(num)]
    rng = random.Random(f"arrivals {seed}")  # noqa: S311 - a load, not a secret
    ends = list(itertools.accumulate(rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(num)))
    scale = num / rate / ends[-1] if ends[-1] > 0 else 1.0  # tiny shapes round to 0
    return [end * scale for end in ends]
