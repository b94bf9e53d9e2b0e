"""Sends requests that must be refused at once, around the limit of a prompt's length and with bytes that are no text.

Runs in a process of its own.
"""

import asyncio
import time
from collections.abc import Sequence

import grpc
from hostile_load import status_of
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb

from serve.protos.jaxinfer.v1 import generation_pb2 as pb

NATIVE = "/jaxinfer.v1.GenerationService/GenerateStream"
VLLM = "/vllm.grpc.engine.VllmEngine/Generate"
MARK = "never in a prompt"
Sent = tuple[str, bytes, str, tuple[str, ...]]
"""Path, bytes, the status that must come and words that its text must have."""


def native(prompt: str | Sequence[int]) -> bytes:
    message = pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=1))
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message.SerializeToString()


def vllm(prompt: str | Sequence[int]) -> bytes:
    message = vllm_pb.GenerateRequest(stream=True, sampling_params=vllm_pb.SamplingParams(max_tokens=1))
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.tokenized.input_ids.extend(prompt)
    return message.SerializeToString()


def requests(most: int) -> list[Sent]:
    """most: tokens of the longest prompt that is taken."""
    found: list[Sent] = []
    for path, message in ((NATIVE, native), (VLLM, vllm)):
        found.append((path, message([7] * most), "OK", ()))
        for count in (most + 1, most + 2, 100_000):
            found.append((path, message([7] * count), "INVALID_ARGUMENT", (str(count), str(most))))
        found.append((path, message("x = 1\n" * 100_000), "INVALID_ARGUMENT", ("600000", "max_model_len")))
        for bad in (b"\xff" * len(MARK), b"\xed\xa0\x80".ljust(len(MARK)), b"\xc3".rjust(len(MARK))):
            found.append((path, message(MARK).replace(MARK.encode(), bad), "INVALID_ARGUMENT", ("UTF-8",)))
    return found


def send(address: str, most: int, rounds: int) -> tuple[list[float], list[str]]:
    """All of them, one after the other, `rounds` times: seconds of each that is refused; what came out otherwise."""
    return asyncio.run(_send(address, requests(most), rounds))


async def _send(address: str, asked: list[Sent], rounds: int) -> tuple[list[float], list[str]]:
    seconds, problems = [], []
    async with grpc.aio.insecure_channel(address) as channel:
        for path, data, wanted, words in asked * rounds:
            began = time.monotonic()
            code, text = await status_of(channel, (path, data))
            if code != "OK":
                seconds.append(time.monotonic() - began)
            if code != wanted or any(word not in (text or "") for word in words):
                problems.append(f"{path}, {len(data)} bytes: {code} {text}, expected {wanted} with {words}")
    return seconds, problems
