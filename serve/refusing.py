"""Calls that end before anything of them is read."""

from collections.abc import AsyncIterator

import grpc

Context = grpc.aio.ServicerContext


def refusing(code: grpc.StatusCode, text: str, trailing_metadata: tuple[tuple[str, str], ...] = ()
             ) -> grpc.RpcMethodHandler:  # fmt: skip
    """Ends any kind of call. As one of streams: the other kinds would wait for a message first."""
    async def refuse(messages: AsyncIterator[bytes], context: Context) -> None:
        await context.abort(code, text, trailing_metadata)

    return grpc.stream_stream_rpc_method_handler(refuse)
