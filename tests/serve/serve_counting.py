"""A service of its own: serve_counting.py LOAD_SECONDS DRAIN_SECONDS [ENGINE_DIES_AFTER_SECONDS [TOKENIZER_FOLDER]]."""

import sys
import threading
import time
from pathlib import Path

from counting_engine import CountingEngine, make_core

from jaxinfer.core import Core
from serve.server import ServerConfig, serve


def main() -> int:
    load_seconds, drain_seconds, dies_after = map(float, [*sys.argv[1:4], "0"][:3])
    folder = Path(sys.argv[4]) if len(sys.argv) > 4 else None

    def load() -> Core:
        if load_seconds < 0:
            raise ValueError("no such model")
        time.sleep(load_seconds)
        engine = CountingEngine(pace=0.01)
        if dies_after:
            threading.Timer(dies_after, engine.die).start()
        return make_core(engine, folder=folder)

    return serve(load, ServerConfig(port=0, drain_seconds=drain_seconds))


if __name__ == "__main__":
    sys.exit(main())
