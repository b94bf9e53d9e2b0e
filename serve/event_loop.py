"""The event loop that a server runs on: uvloop's, or asyncio's own on Windows, which uvloop does not support.

uvloop takes a tenth of the CPU of a streamed token away: see `bench_serve` in benchmarks/README.md.
"""

import sys

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

__all__ = ["new_event_loop"]
