"""The two services as the bench's client sees them: where to send which bytes, and how many tokens come back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb

from serve.protos.jaxinfer.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class Service:
    """make_request(id, prompt, max_tokens): a streamed request as bytes, of a text or of token ids.

    response: the class of the messages that come back. num_tokens: of one message.
    """

    name: str
    method: str
    make_request: Callable[[str, str | Sequence[int], int], bytes]
    request: Any
    response: Any
    num_tokens: Callable[[Any], int]

    def count(self, raw: bytes) -> int:
        """Tokens in a message as it came."""
        return self.num_tokens(self.response.FromString(raw))


def native_request(id: str, prompt: str | Sequence[int], max_tokens: int) -> bytes:
    message = pb.GenerateRequest(request_id=id, sampling=pb.SamplingParams(max_tokens=max_tokens, temperature=0.0))
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message.SerializeToString()


def vllm_request(id: str, prompt: str | Sequence[int], max_tokens: int) -> bytes:
    message = vllm_pb.GenerateRequest(request_id=id, stream=True, sampling_params=vllm_pb.SamplingParams(
        max_tokens=max_tokens, temperature=0.0))
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.tokenized.input_ids.extend(prompt)
    return message.SerializeToString()


NATIVE = Service("jaxinfer.v1", "/jaxinfer.v1.GenerationService/GenerateStream", native_request, pb.GenerateRequest,
                 pb.GenerateStreamResponse, lambda message: sum(len(delta.token_ids) for delta in message.deltas))
VLLM = Service("vllm.grpc", "/vllm.grpc.engine.VllmEngine/Generate", vllm_request, vllm_pb.GenerateRequest,
               vllm_pb.GenerateResponse, lambda message: len(message.chunk.token_ids))
SERVICES = {service.name: service for service in (NATIVE, VLLM)}
