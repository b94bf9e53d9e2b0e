"""A service of as many rows as there are requests, whose tokens cost nothing: serve_many.py STALL_TIMEOUT."""

import sys

from counting_engine import CountingEngine, make_core

from serve.server import ServerConfig, serve

TOKENS_A_STEP, PACE = 100, 0.02


def main() -> int:
    config = ServerConfig(port=0, metrics_port=0, stall_timeout=float(sys.argv[1]), drain_seconds=5.0)
    return serve(lambda: make_core(CountingEngine(tokens_per_step=TOKENS_A_STEP, pace=PACE)), config)


if __name__ == "__main__":
    sys.exit(main())
