"""Requests whose bytes are no message, answered INVALID_ARGUMENT: gRPC itself answers UNKNOWN and logs a traceback."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from inspect import isasyncgen
from typing import Any

import grpc
from google.protobuf.message import DecodeError

Context = grpc.aio.ServicerContext
Read = Callable[[bytes, Context], Awaitable[Any]]
"""Makes a message of bytes, or ends the call."""


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
        return reading_itself(handler, reader(handler.request_deserializer, handler_call_details.method,
                                              self._ended))


def reader(parse: Callable[[bytes], Any], method: str, ended: Counter[str]) -> Read:
    """method: as in the path of the call, for the text."""
    async def read(data: bytes, context: Context) -> Any:
        try:
            return parse(data)
        except (DecodeError, UnicodeDecodeError):  # which of them depends on protobuf's implementation
            ended["INVALID_ARGUMENT"] += 1
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"request: the {len(data)} bytes sent to {method} are malformed protobuf, or hold a string that is not "
                "UTF-8; make them with the stubs of the service's .proto")

    return read


def reading_itself(handler: Any, read: Read) -> grpc.RpcMethodHandler:
    """`handler` with bytes for its requests. One that takes a stream and answers once stays as it is: we have none."""
    if handler.unary_unary is not None:
        async def answer(data: bytes, context: Context) -> Any:
            return await handler.unary_unary(await read(data, context), context)

        return grpc.unary_unary_rpc_method_handler(answer, None, handler.response_serializer)
    if handler.unary_stream is not None:
        async def stream(data: bytes, context: Context) -> None:
            await send(handler.unary_stream(await read(data, context), context), context)

        return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
    if handler.stream_stream is not None:
        async def exchange(pieces: AsyncIterator[bytes], context: Context) -> None:
            await send(handler.stream_stream(read_all(pieces, read, context), context), context)

        return grpc.stream_stream_rpc_method_handler(exchange, None, handler.response_serializer)
    return handler


async def read_all(pieces: AsyncIterator[bytes], read: Read, context: Context) -> AsyncIterator[Any]:
    async for data in pieces:
        yield await read(data, context)


async def send(responses: Any, context: Context) -> None:
    """Sends what a handler yields; one that is no generator sends by itself.

    It is gRPC's own loop, so a message passes through no more hands than without us, and the handler is left before
    the call has ended.
    """
    if not isasyncgen(responses):
        await responses
        return
    async with aclosing(responses):
        async for response in responses:
            await context.write(response)
