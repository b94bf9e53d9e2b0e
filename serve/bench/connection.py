"""Connections to the server, and what is asked of it besides the load."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from jaxinfer.errors import InvalidConfig
from serve import answers
from serve.bench.config import BenchConfig
from serve.client import CHANNEL_OPTIONS
from serve.client_security import Metadata, Tls, bearer, open_channel, with_metadata
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc

OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.enable_retries", 0),  # a refusal is a result
    ("grpc.use_local_subchannel_pool", 1),  # or all channels would share one connection
)
POLL_SECONDS = 0.2
ANSWER_SECONDS = 10.0
ADVICE = {
    "UNAUTHENTICATED": "; name a file with its token: --token-file",
    "UNAVAILABLE": "; start it with jaxinfer serve, name another with --address, or wait: --ready-check-timeout-sec",
    "UNIMPLEMENTED": "; it must serve jaxinfer.v1, as jaxinfer serve does",
}
"""What to do where a server does not answer, by status."""
ADVICE_WITHOUT_TLS = "; if it has TLS: --tls, or --tls-ca with the file of its authority"


class Connections:
    """Each request goes over the connection that runs the fewest."""

    def __init__(self, channels: list[Any], metadata: Metadata | None):
        self._channels = channels
        self._running = [0] * len(channels)
        self._stubs = [pb_grpc.GenerationServiceStub(with_metadata(channel, metadata)) for channel in channels]

    def acquire(self) -> int:
        """The number of a connection, to be released."""
        number = self._running.index(min(self._running))
        self._running[number] += 1
        return number

    def release(self, number: int) -> None:
        self._running[number] -= 1

    def stub(self, number: int = 0) -> pb_grpc.GenerationServiceStub:
        return self._stubs[number]

    async def connect(self) -> None:
        """Before the load, which should not wait for handshakes."""
        for channel in self._channels:
            await asyncio.wait_for(channel.channel_ready(), ANSWER_SECONDS)


@asynccontextmanager
async def connected(config: BenchConfig):
    """Yields Connections and ModelInfo. Raises InvalidConfig where the server cannot be used."""
    tls = Tls(ca=config.tls_ca, cert=config.tls_cert, key=config.tls_key, server_name=config.tls_server_name)
    try:
        metadata = bearer(token(config), config.target, encrypted=config.uses_tls or config.insecure)
    except ValueError as error:
        raise InvalidConfig("token_file", str(error)) from None
    try:
        channels = [open_channel(grpc.aio, config.target, tls if config.uses_tls else None, OPTIONS)
                    for _ in range(config.num_connections)]
    except ValueError as error:
        raise InvalidConfig("tls_ca" if config.tls_cert is None else "tls_cert", str(error)) from None
    try:
        connections = Connections(channels, metadata)
        info = await asked(config, lambda: connections.stub().GetModelInfo(
            pb.GetModelInfoRequest(), timeout=ANSWER_SECONDS))
        await connections.connect()
        yield connections, answers.model_info(info)
    except TimeoutError:
        raise InvalidConfig("connections", f"{config.target} did not accept {config.num_connections} connections "
                            f"within {ANSWER_SECONDS:g} s; ask for fewer") from None
    finally:
        for channel in channels:
            await channel.close()


async def asked(config: BenchConfig, call: Callable[[], Awaitable[Any]]) -> Any:
    """The answer; asks again while the server is not there or loads, for as long as the config says."""
    deadline = time.monotonic() + config.ready_check_timeout_sec
    while True:
        try:
            return await call()
        except grpc.RpcError as error:
            code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
            if code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                advice = ADVICE.get(code.name, "")
                if code is grpc.StatusCode.UNAVAILABLE and not config.uses_tls:
                    advice += ADVICE_WITHOUT_TLS
                raise InvalidConfig("address", f"{config.target} cannot be measured: {code.name}: {details}{advice}"
                                    ) from None  # fmt: skip
            await asyncio.sleep(POLL_SECONDS)


async def with_lengths(connections: Connections, samples: list[Any], config: BenchConfig) -> list[int]:
    """Output tokens of each sample; the server counts those of recorded answers."""
    counted: dict[str, int] = {}
    for sample in samples:
        if sample.answer is not None and sample.answer not in counted:
            ids = await asked(config, lambda text=sample.answer: connections.stub().Tokenize(
                pb.TokenizeRequest(text=text, add_special_tokens=False), timeout=ANSWER_SECONDS))
            counted[sample.answer] = max(len(ids.token_ids), 1)
    return [sample.output_len if sample.answer is None else counted[sample.answer] for sample in samples]


def token(config: BenchConfig) -> str | None:
    """The last word of the first line that is no comment. Raises InvalidConfig, OSError."""
    if config.token_file is None:
        return None
    try:
        lines = Path(config.token_file).read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:
        raise InvalidConfig("token_file", f"{config.token_file} is not ASCII text") from None
    words = next((line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")), [])
    if not 1 <= len(words) <= 2:
        raise InvalidConfig("token_file", f"{config.token_file} must begin with a line TOKEN or TENANT TOKEN")
    return words[-1]
