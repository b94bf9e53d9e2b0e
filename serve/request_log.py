"""One line of JSON for each request, on the logger `jaxinfer.requests`: who, how much, how long, and how it ended.

Never what: no text, no token ids. Ids are the client's: they are cut, and escaped to ASCII so that one is one line.
"""

import json
import logging
import sys
import time
from typing import Any

from jaxinfer.types import RequestStats
from serve.generation import Generation
from serve.tenant import current_tenant

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


def write(request_id: str, code: str, generation: Generation | None) -> None:
    """A request of the running call's tenant has ended with status `code`; generation: None if it was refused unread.
    """
    log.info(json.dumps(entry(request_id, current_tenant(), code, generation)))


def entry(request_id: str, tenant: str, code: str, generation: Generation | None) -> dict[str, Any]:
    """Times in seconds since the request arrived, `time` since 1970; null where it never came so far."""
    found: dict[str, Any] = {"time": round(time.time(), 3), "id": request_id[:MAX_NAME], "tenant": tenant[:MAX_NAME],
                             "code": code}
    if generation is None:
        return found
    found["id"] = generation.request.id[:MAX_NAME]
    return found | counts(generation, code) | times(generation.engine_stats())


def counts(generation: Generation, code: str) -> dict[str, Any]:
    """finish: samples by the reason of their end; those that an answered call left unfinished were aborted."""
    finish = dict(generation.finish_reasons)
    if code == "OK" and not generation.finished:
        finish["abort"] = generation.request.params.n - sum(finish.values())
    return {"finish": finish, "prompt_tokens": len(generation.request.prompt),
            "cached_tokens": generation.num_cached_tokens, "output_tokens": generation.num_output_tokens}


def times(stats: RequestStats) -> dict[str, Any]:
    def since(moment: float) -> float | None:
        return round(moment - stats.arrival, DECIMALS) if moment else None

    return {"queue": since(stats.scheduled), "ttft": since(stats.first_token), "total": since(time.monotonic()),
            "preemptions": stats.num_preemptions}
