"""A steady stream of greedy requests beside a fault: its answers must not change, and its pace is measured."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from serve.client import Client

PROMPT = "def fibonacci(n):\n"
TOKENS = 48
MARGIN = 1e-3
"""Nats between the chosen token and the next likely one, at least. The canary's tokens are computed in decode steps
when it is alone and in prefill steps beside others; between the two float32 logits differ by about 1e-6.
"""


@dataclass
class Paced:
    """Answers that were the same, and seconds between their messages (of one token each, where a step makes one).
    refused: requests that were not taken.
    """

    answers: int = 0
    refused: int = 0
    gaps: list[float] = field(default_factory=list)

    def p99_ms(self) -> float:
        return round(quantile(self.gaps, 0.99) * 1000, 1)


class Canary:
    """Learns its answer while the server is quiet."""

    def __init__(self, address: str, prompt: str = PROMPT, tokens: int = TOKENS,
                 may_refuse: tuple[grpc.StatusCode, ...] = (grpc.StatusCode.RESOURCE_EXHAUSTED,)):
        """may_refuse: what a request may be told instead of its first token."""
        self._address, self._prompt, self._tokens, self._may_refuse = address, prompt, tokens, may_refuse
        self.wanted: tuple[int, ...] = ()
        self.quiet = Paced()
        with Client(address) as client:
            self._learn(client)

    def _learn(self, client: Client) -> None:
        answer = client.generate(self._prompt, max_tokens=self._tokens, temperature=0, ignore_eos=True, logprobs=2,
                                 timeout=60)
        self.wanted = answer.token_ids
        gaps = [one.top[0].logprob - one.top[1].logprob for one in answer.logprobs]
        assert min(gaps) > MARGIN, f"two tokens are {min(gaps)} apart; choose another prompt for the canary"
        for _ in range(5):
            self._ask(client, self.quiet)

    @contextmanager
    def beside(self) -> Iterator[Paced]:
        """Asks on and on, on a thread; raises at the end if an answer was not the quiet one, or there was none."""
        paced, stop, problems = Paced(), threading.Event(), []

        def run() -> None:
            with Client(self._address) as client:
                while not stop.is_set():
                    try:
                        self._ask(client, paced)
                    except Exception as error:  # told by the test's own thread
                        problems.append(error)
                        return

        thread = threading.Thread(target=run, name="canary")
        thread.start()
        try:
            yield paced
        finally:
            stop.set()
            thread.join(60)
        if problems:
            raise AssertionError("the canary did not hold") from problems[0]
        assert paced.answers, "the canary had no answer"

    def _ask(self, client: Client, paced: Paced) -> None:
        ids: list[int] = []
        last = 0.0
        try:
            for delta in client.stream(self._prompt, max_tokens=self._tokens, temperature=0, ignore_eos=True,
                                       priority=-1, timeout=60):
                now = time.monotonic()
                if last:
                    paced.gaps.append(now - last)
                last = now
                ids += delta.token_ids
        except grpc.RpcError as error:
            if error.code() not in self._may_refuse or ids:
                raise
            paced.refused += 1
            time.sleep(0.05)
            return
        assert tuple(ids) == self.wanted, f"{ids} is not {self.wanted}"
        paced.answers += 1


def quantile(values: list[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed; 0.0 of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0
