"""How soon clients learn that a server is gone."""

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from serve.client import Client


def told_unavailable(client: Client, harm: Callable[[], None], wait: Callable[[], object]) -> list[float]:
    """Does `harm` while two streams run; seconds from then until either of them was told UNAVAILABLE, and what a new
    call took to be told so, made after `wait`.
    """
    streams = [iter(client.stream("import", max_tokens=200, temperature=0, ignore_eos=True)) for _ in range(2)]
    for stream in streams:
        next(stream)
    ends: list[float] = []
    threads = [threading.Thread(target=ends_unavailable, args=(lambda stream=stream: list(stream), ends))
               for stream in streams]
    for thread in threads:
        thread.start()
    harm()
    harmed = time.monotonic()
    for thread in threads:
        thread.join(10)
    wait()
    lags = [end - harmed for end in ends]
    began = time.monotonic()
    ends_unavailable(lambda: client.load(timeout=10), ends)
    assert len(ends) == len(threads) + 1, "not all calls ended with UNAVAILABLE"
    return [*lags, ends[-1] - began]


def ends_unavailable(call: Callable[[], Any], ends: list[float]) -> None:
    """Notes when it ended, if it was with UNAVAILABLE."""
    try:
        call()
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            ends.append(time.monotonic())
