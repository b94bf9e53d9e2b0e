"""When a refused client may come back.

As `grpc-retry-pushback-ms`, gRPC's own field for it (gRFC A6): clients with a retry policy obey it without a line of
code, and others read it like any trailing metadata. `google.rpc.RetryInfo` would need another package on both sides.
"""

import random

from jaxinfer.errors import Overloaded

KEY = "grpc-retry-pushback-ms"
SHORTEST, LONGEST = 1000, 2000
"""Milliseconds. Drawn between the two, so that those who were refused together do not come back together."""


def retry_hint(error: BaseException) -> tuple[tuple[str, str], ...]:
    """Trailing metadata for the refusal of a call; () where waiting would not help."""
    if not isinstance(error, Overloaded):
        return ()
    return ((KEY, str(random.randint(SHORTEST, LONGEST))),)  # noqa: S311 (spreads load, no secret)
