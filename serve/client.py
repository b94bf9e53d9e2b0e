"""A small typed client. Needs grpcio and protobuf only: importing it never imports jax or the engine.

    with Client("127.0.0.1:50051") as client:
        client.wait_ready()
        print(client.generate("def fibonacci(n):", max_tokens=64).text)

Errors are `grpc.RpcError`: `error.code()` says what kind (the kinds are listed in generation.proto), `error.details()`
what to do about it. Every call takes `timeout`, the RPC's deadline in seconds.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from json import dumps
from typing import Any, Self, TypedDict, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.core import Load, ModelInfo
from jaxinfer.types import STRUCTURED_KINDS, StructuredOutput
from serve import answers
from serve.answers import Completion, Delta, Timings, TokenLogprob, Usage
from serve.client_security import Tls, bearer, open_channel, with_metadata
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages: {"role": .., "content": ..}."""

POLL_SECONDS = 0.05
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # the default second is long for a server that is just starting
    ("grpc.max_reconnect_backoff_ms", 2000),
)


class Structured(TypedDict, total=False):
    """What the output must look like: one kind, as in {"json": {"type": "object"}} or {"regex": "[0-9]+"}.

    `jaxinfer.StructuredOutput` explains each.
    """

    json: str | Mapping[str, Any] | None
    json_object: bool | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    disable_any_whitespace: bool | None


class Sampling(TypedDict, total=False):
    """How to sample; what is left out (or None) takes the server's default. `jaxinfer.SamplingParams` explains each."""

    n: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    max_tokens: int | None
    min_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    include_stop_str_in_output: bool | None
    detokenize: bool | None
    skip_special_tokens: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    banned_token_ids: Sequence[int] | None
    bad_words: str | Sequence[str] | None
    structured_outputs: Structured | StructuredOutput | None


class Envelope(Sampling, total=False):
    """What goes beside the prompt. priority: lower runs first. cache_salt: prefixes are shared within one salt only."""

    request_id: str | None
    priority: int | None
    cache_salt: str | None


class _Ending:
    """What a stream's messages bring besides deltas."""

    def __init__(self):
        self.request_id = ""
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def read(self, message: pb.GenerateStreamResponse) -> list[Delta]:
        self.request_id = message.request_id or self.request_id
        self.prompt_logprobs += answers.token_logprobs(message.prompt_logprobs)
        if message.HasField("usage"):
            self.usage, self.timings = answers.usage(message.usage), answers.timings(message.timings)
        return [Delta.read(one) for one in message.deltas]


class Stream(_Ending):
    """Iterates over deltas. usage and timings are there at the end; leaving it early cancels the request."""

    def __init__(self, call: Any):
        super().__init__()
        self._call = call

    def __iter__(self) -> Iterator[Delta]:
        for message in self._call:
            yield from self.read(message)

    def cancel(self) -> None:
        """Ends the request; the server frees its memory within a step."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cancel()


class AsyncStream(_Ending):
    """`Stream` for asyncio: `async for`, `async with`."""

    def __init__(self, call: Any):
        super().__init__()
        self._call = call

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for message in self._call:
            for delta in self.read(message):
                yield delta

    def cancel(self) -> None:
        """Ends the request; the server frees its memory within a step."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cancel()


class Client:
    """Blocking client of one server; thread-safe.

    tls: True checks the server against the machine's authorities, `Tls` against your own. token: sent with every call;
    without TLS to this machine only, unless insecure.
    """

    def __init__(self, address: str = "127.0.0.1:50051", *, tls: Tls | bool | None = None, token: str | None = None,
                 insecure: bool = False):
        self.address = address
        metadata = bearer(token, address, encrypted=bool(tls) or insecure)
        self._channel = open_channel(grpc, address, tls, CHANNEL_OPTIONS)
        self._stub = pb_grpc.GenerationServiceStub(with_metadata(self._channel, metadata))
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Envelope]) -> Completion:
        """Generates to the end."""
        return Completion.read(self._stub.Generate(request_message(prompt, options), timeout=timeout))

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Envelope]) -> Stream:
        """Generates, and yields what is new as it comes."""
        return Stream(self._stub.GenerateStream(request_message(prompt, options), timeout=timeout))

    def tokenize(self, prompt: str | Sequence[Mapping[str, str]], *, add_special_tokens: bool | None = None,
                 timeout: float | None = None) -> list[int]:
        """Token ids of text or chat messages, as the server would read them."""
        return list(self._stub.Tokenize(tokenize_message(prompt, add_special_tokens), timeout=timeout).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None,
                   timeout: float | None = None) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, **_given(skip_special_tokens=skip_special_tokens))
        return self._stub.Detokenize(request, timeout=timeout).text

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        return answers.model_info(self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout))

    def load(self, *, timeout: float | None = None) -> Load:
        """How busy the engine is."""
        return answers.load(self._stub.GetLoad(pb.GetLoadRequest(), timeout=timeout))

    def wait_ready(self, timeout: float = 600.0) -> None:
        """Waits until the server has loaded and compiled its model; a first start takes long. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while not self._is_serving(timeout=max(deadline - time.monotonic(), POLL_SECONDS)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.address} was not ready after {timeout:g} s")
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _is_serving(self, timeout: float) -> bool:
        try:
            return is_serving(self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout))
        except grpc.RpcError:
            return False


class AsyncClient:
    """`Client` for asyncio; make it inside a running loop."""

    def __init__(self, address: str = "127.0.0.1:50051", *, tls: Tls | bool | None = None, token: str | None = None,
                 insecure: bool = False):
        self.address = address
        metadata = bearer(token, address, encrypted=bool(tls) or insecure)
        self._channel = open_channel(grpc.aio, address, tls, CHANNEL_OPTIONS)
        self._stub = pb_grpc.GenerationServiceStub(with_metadata(self._channel, metadata))
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def generate(self, prompt: Prompt, *, timeout: float | None = None,
                       **options: Unpack[Envelope]) -> Completion:
        """Generates to the end."""
        return Completion.read(await self._stub.Generate(request_message(prompt, options), timeout=timeout))

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Envelope]) -> AsyncStream:
        """Generates, and yields what is new as it comes."""
        return AsyncStream(self._stub.GenerateStream(request_message(prompt, options), timeout=timeout))

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]], *, add_special_tokens: bool | None = None,
                       timeout: float | None = None) -> list[int]:
        """Token ids of text or chat messages, as the server would read them."""
        response = await self._stub.Tokenize(tokenize_message(prompt, add_special_tokens), timeout=timeout)
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None,
                         timeout: float | None = None) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, **_given(skip_special_tokens=skip_special_tokens))
        return (await self._stub.Detokenize(request, timeout=timeout)).text

    async def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        return answers.model_info(await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout))

    async def load(self, *, timeout: float | None = None) -> Load:
        """How busy the engine is."""
        return answers.load(await self._stub.GetLoad(pb.GetLoadRequest(), timeout=timeout))

    async def wait_ready(self, timeout: float = 600.0) -> None:
        """Waits until the server has loaded and compiled its model; a first start takes long. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while not await self._is_serving(timeout=max(deadline - time.monotonic(), POLL_SECONDS)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.address} was not ready after {timeout:g} s")
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _is_serving(self, timeout: float) -> bool:
        try:
            return is_serving(await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout))
        except grpc.RpcError:
            return False


def request_message(prompt: Prompt, options: Envelope) -> pb.GenerateRequest:
    """The wire's request; only what was given is set.

    Raises TypeError on an unknown option or a wrong type, ValueError where the wire could not carry what was meant.
    """
    given = _given(**options)
    for name in ("stop", "bad_words"):
        if isinstance(given.get(name), str):
            given[name] = [given[name]]
    envelope = {name: given.pop(name) for name in ("request_id", "priority", "cache_salt") if name in given}
    unknown = given.keys() - Sampling.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options {', '.join(sorted(unknown))}")
    if "allowed_token_ids" in given and not len(given["allowed_token_ids"]):
        # On the wire an empty list is none at all, which would allow everything.
        raise ValueError("allowed_token_ids is empty; give at least one token, or leave it out")
    if "structured_outputs" in given:
        given["structured_outputs"] = structured_output_message(given["structured_outputs"])
    request = pb.GenerateRequest(sampling=pb.SamplingParams(**given), **envelope)
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat_prompt(prompt))
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))  # pyright: ignore[reportArgumentType]
    return request


def structured_output_message(wanted: Structured | StructuredOutput) -> pb.StructuredOutput:
    """The wire's form. Raises TypeError on an unknown field or a wrong type, ValueError where two kinds are given.
    """
    fields: dict[str, Any] = asdict(wanted) if isinstance(wanted, StructuredOutput) else {**wanted}
    known = Structured.__annotations__
    if unknown := fields.keys() - known.keys():
        raise TypeError(f"structured_outputs has unknown fields {', '.join(sorted(unknown))}; there are "
                        f"{', '.join(known)}")
    set_: dict[str, Any] = {name: value for name, value in fields.items() if value is not None and value is not False}
    kinds = [name for name in STRUCTURED_KINDS if name in set_]
    if len(kinds) > 1:  # a message holds one: the others would be lost
        raise ValueError(f"structured_outputs must set exactly one of {', '.join(STRUCTURED_KINDS)}, got "
                         f"{' and '.join(kinds)}")
    if "json" in set_ and not isinstance(set_["json"], str):
        set_["json"] = dumps(set_["json"])
    if "choice" in set_:
        if isinstance(set_["choice"], str):  # the wire would take its characters
            raise TypeError("structured_outputs.choice must be a list of strings, got one string")
        set_["choice"] = pb.Choices(texts=set_["choice"])
    return pb.StructuredOutput(**set_)


def tokenize_message(prompt: str | Sequence[Mapping[str, str]], add_special_tokens: bool | None) -> pb.TokenizeRequest:
    request = pb.TokenizeRequest(**_given(add_special_tokens=add_special_tokens))
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.chat.CopyFrom(chat_prompt(prompt))
    return request


def chat_prompt(messages: Sequence[Any]) -> pb.ChatPrompt:
    return pb.ChatPrompt(messages=[pb.ChatMessage(**message) for message in messages])


def is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    return response.status == health_pb2.HealthCheckResponse.SERVING


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
