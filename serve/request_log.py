"""One line of JSON for each request, on the logger `jaxinfer.requests`: who, how much, how long, and how it ended.

Never what: no text, no token ids. Ids are the client's: they are cut, and escaped to ASCII so that one is one line.
"""

import json
import logging
import sys
import time
from typing import Any

from jaxinfer.types import RequestStats
from serve.ended_request import EndedRequest
from serve.generation import Generation

log = logging.getLogger("jaxinfer.requests")

MAX_NAME = 128
"""Characters of an id or tenant that are logged."""
DECIMALS = 6


def to_standard_error() -> None:
    """Writes the lines there, unless the logger has a handler already (an application's own)."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)


def write(ended: EndedRequest) -> None:
    """The observer that writes the line."""
    log.info(json.dumps(entry(ended)))


def entry(ended: EndedRequest) -> dict[str, Any]:
    """Times in seconds since the request arrived, `time` since 1970; null where it never came so far. field: which one
    was refused, null where it was not that.
    """
    found: dict[str, Any] = {"time": round(time.time(), 3), "id": ended.id[:MAX_NAME],
                             "tenant": ended.tenant[:MAX_NAME], "code": ended.code, "field": ended.field_refused}
    if ended.generation is None:
        return found | {"total": round(time.monotonic() - ended.began, DECIMALS)}
    return found | counts(ended, ended.generation) | times(ended.generation.engine_stats())


def counts(ended: EndedRequest, generation: Generation) -> dict[str, Any]:
    return {"finish": dict(ended.finish()), "prompt_tokens": len(generation.request.prompt),
            "cached_tokens": generation.num_cached_tokens, "output_tokens": generation.num_output_tokens}


def times(stats: RequestStats) -> dict[str, Any]:
    def since(moment: float) -> float | None:
        return round(moment - stats.arrival, DECIMALS) if moment else None

    return {"queue": since(stats.scheduled), "ttft": since(stats.first_token), "total": since(time.monotonic()),
            "preemptions": stats.num_preemptions}
