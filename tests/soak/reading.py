"""A stream that is read as it comes."""

import threading
from typing import Any

import grpc

from serve.client import Stream


class Reading(threading.Thread):
    """Reads a stream to its end; `ids` are what came, `error` is what ended it."""

    def __init__(self, stream: Stream):
        super().__init__()
        self.stream = stream
        self.ids: list[int] = []
        self.error: Any = None
        self.start()

    def run(self) -> None:
        try:
            for delta in self.stream:
                self.ids += delta.token_ids
        except grpc.RpcError as error:
            self.error = error
