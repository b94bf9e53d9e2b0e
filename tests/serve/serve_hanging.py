"""A service of its own whose engine hangs for ever half a second after it is ready: serve_hanging.py HANG EXIT."""

import sys
import threading

from paged_engine import paged_core

from jaxinfer.core import Core
from serve.server import ServerConfig, serve


def load() -> Core:
    core = paged_core()
    hang = threading.Timer(0.5, core.engine.run, (lambda engine: threading.Event().wait(),))
    hang.daemon = True
    hang.start()
    return core


if __name__ == "__main__":
    seconds, exit_seconds = map(float, sys.argv[1:])
    sys.exit(serve(load, ServerConfig(port=0, hang_seconds=seconds, hang_exit_seconds=exit_seconds)))
