"""Standard output and standard error of the server's process: what is announced, and what is logged.

A reader of either that stops must not stop the server, so that nothing here waits for one.
"""

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from serve import request_log
from serve.line_writer import LineWriter

PACKAGES = ("jaxinfer", "serve", "pallas_kernels", "checkpoints")
"""Whose lines the level chooses. Others are heard from WARNING on: what they say below is for their own developers."""
FLUSH_SECONDS = 1.0
"""What readers get, at the end, to take what waits."""


class LineFormatter(logging.Formatter):
    """Time in UTC, level, logger, text; the request log's lines are JSON and stay it."""

    converter = time.gmtime
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == request_log.log.name else super().format(record)


class LineHandler(logging.Handler):
    """Hands lines to a writer."""

    def __init__(self, lines: LineWriter):
        super().__init__()
        self.setFormatter(LineFormatter())
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put(self.format(record))
        except Exception as error:  # logging's own way to say so writes to standard error and would wait for it
            self._lines.put(f"a line of {record.name} could not be made of {record.msg!r}: {error!r}")


class Console:
    """Configures logging while it is entered, unless the application has done so: then all of that stays as it is."""

    def __init__(self, level: str):
        """level: one of `serve.server_config.LOG_LEVELS`."""
        self.output = LineWriter(sys.__stdout__.fileno() if sys.__stdout__ else 1)
        self.errors = LineWriter(sys.__stderr__.fileno() if sys.__stderr__ else 2)
        self._handler = LineHandler(self.errors)
        self._level = getattr(logging, level.upper())
        self._configured: list[tuple[logging.Logger, int, bool]] = []
        """Loggers as they were."""

    def __enter__(self) -> "Console":
        if isinstance(sys.stdout, io.TextIOWrapper):  # what others print must come before what is announced after it
            sys.stdout.reconfigure(line_buffering=True)
        root = logging.getLogger()
        if not root.handlers:
            self._take(root, max(self._level, logging.WARNING))
            root.addHandler(self._handler)
            for name in PACKAGES:
                self._take(logging.getLogger(name), self._level)
        if not request_log.log.handlers:
            self._take(request_log.log, request_log.log.level)
            request_log.log.addHandler(self._handler)
            request_log.log.propagate = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:  # fmt: skip
        for logger, level, propagate in self._configured:
            logger.removeHandler(self._handler)
            logger.setLevel(level)
            logger.propagate = propagate
        self._for_each(LineWriter.close)

    def exit_now(self, status: int) -> None:
        """Ends the process without the interpreter's own shutdown, which a thread inside XLA would abort or hold up.

        Nothing is lost but lines that nobody reads: files are published by rename only.
        """
        try:
            flush = threading.Thread(target=self._flush_everything, name="jaxinfer-exit", daemon=True)
            flush.start()
            flush.join(2 * FLUSH_SECONDS)
        finally:
            os._exit(status)

    def _take(self, logger: logging.Logger, level: int) -> None:
        self._configured.append((logger, logger.level, logger.propagate))
        logger.setLevel(level)

    def _for_each(self, finish: Callable[[LineWriter, float], object]) -> None:
        end = time.monotonic() + FLUSH_SECONDS
        for lines in (self.output, self.errors):
            finish(lines, max(0.0, end - time.monotonic()))

    def _flush_everything(self) -> None:
        self._for_each(LineWriter.flush)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
