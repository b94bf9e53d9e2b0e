"""A service in a process of its own: python serve_counting.py LOAD_SECONDS DRAIN_SECONDS."""

import sys
import time

from counting_engine import CountingEngine, make_core

from jaxinfer.core import Core
from serve.server import ServerConfig, serve


def main() -> int:
    load_seconds, drain_seconds = map(float, sys.argv[1:])

    def load() -> Core:
        if load_seconds < 0:
            raise ValueError("no such model")
        time.sleep(load_seconds)
        return make_core(CountingEngine(pace=0.01))

    return serve(load, ServerConfig(port=0, drain_seconds=drain_seconds))


if __name__ == "__main__":
    sys.exit(main())
