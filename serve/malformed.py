"""Requests whose bytes are no message, answered INVALID_ARGUMENT: gRPC itself answers UNKNOWN and logs a traceback."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from inspect import isasyncgen, markcoroutinefunction
from typing import Any

import grpc
from google.protobuf.message import DecodeError

Context = grpc.aio.ServicerContext


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Hands the bytes past gRPC and reads them inside the call, which is where it can be given a status.

    It is for asynchronous handlers, as all of ours, of health and of reflection are.
    """

    def __init__(self, ended: Counter[str]):
        """ended: calls by status, where refusals are counted."""
        self._ended = ended

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]],
                                handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None:  # gRPC answers UNIMPLEMENTED
            return handler
        return reading_itself(handler, Reader(handler.request_deserializer, handler_call_details.method, self._ended))


class Reader:
    """Makes messages of the bytes of one call."""

    __slots__ = ("_ended", "_method", "_parse")

    def __init__(self, parse: Callable[[bytes], Any], method: str, ended: Counter[str]):
        """method: as in the path of the call, for the text. ended: calls by status."""
        self._parse = parse
        self._method = method
        self._ended = ended

    def parsed(self, data: bytes) -> Any:
        """The message; None where the bytes are none."""
        try:
            return self._parse(data)
        except (DecodeError, UnicodeDecodeError):  # which of them depends on protobuf's implementation
            return None

    async def refuse(self, data: bytes, context: Context) -> None:
        """Ends the call."""
        self._ended["INVALID_ARGUMENT"] += 1
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"request: the {len(data)} bytes sent to {self._method} are malformed protobuf, or hold a string that is "
            "not UTF-8; make them with the stubs of the service's .proto")

    async def read(self, data: bytes, context: Context) -> Any:
        """The message, or the call's end."""
        message = self.parsed(data)
        if message is None:
            await self.refuse(data, context)
        return message


def reading_itself(handler: Any, reader: Reader) -> grpc.RpcMethodHandler:
    """`handler` with bytes for its requests. One that takes a stream and answers once stays as it is: we have none."""
    if handler.unary_unary is not None:
        async def answer(data: bytes, context: Context) -> Any:
            return await handler.unary_unary(await reader.read(data, context), context)

        return grpc.unary_unary_rpc_method_handler(answer, None, handler.response_serializer)
    if handler.unary_stream is not None:
        def stream(data: bytes, context: Context) -> Awaitable[None]:
            message = reader.parsed(data)
            if message is None:
                return reader.refuse(data, context)
            return sent(handler.unary_stream(message, context), context)

        return grpc.unary_stream_rpc_method_handler(markcoroutinefunction(stream), None, handler.response_serializer)
    if handler.stream_stream is not None:
        def exchange(pieces: AsyncIterator[bytes], context: Context) -> Awaitable[None]:
            return sent(handler.stream_stream(read_all(pieces, reader, context), context), context)

        return grpc.stream_stream_rpc_method_handler(markcoroutinefunction(exchange), None,
                                                     handler.response_serializer)
    return handler


async def read_all(pieces: AsyncIterator[bytes], reader: Reader, context: Context) -> AsyncIterator[Any]:
    async for data in pieces:
        yield await reader.read(data, context)


def sent(responses: Any, context: Context) -> Awaitable[None]:
    """What a handler of a stream has returned, to be awaited: one that is no generator sends by itself.

    Wrappers of such handlers are no coroutines around them: every message would pass each of them, twice.
    """
    return send_all(responses, context) if isasyncgen(responses) else responses


async def send_all(responses: Any, context: Context) -> None:
    """gRPC's own loop; but the handler is left before the call has ended."""
    async with aclosing(responses):
        async for response in responses:
            await context.write(response)
