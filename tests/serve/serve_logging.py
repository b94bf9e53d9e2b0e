"""A service of its own over an engine that counts: serve_logging.py SETTINGS [LOGGER ...].

SETTINGS: those of `ServerConfig`, as JSON. Each LOGGER says something at three levels while the model loads.
"""

import json
import logging
import sys

from counting_engine import CountingEngine, make_core

from jaxinfer.core import Core
from serve.server import ServerConfig, serve


def load() -> Core:
    for name in sys.argv[2:]:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "from %s", name)
    return make_core(CountingEngine(pace=0.001))


if __name__ == "__main__":
    sys.exit(serve(load, ServerConfig(**json.loads(sys.argv[1]))))
