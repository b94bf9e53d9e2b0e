"""Requests of ordinary clients, to all RPCs that generate, as (path, bytes)."""

import random
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2

from serve.protos.jaxinfer.v1 import generation_pb2

BEGINNINGS = ("def fibonacci(n):\n", "class Stack:\n    def push(self, item):\n        ", "import os\nimport sys\n",
              "for line in open(path):\n    ")
"""Shared by many prompts, so that pages are found again, and held by several rows at once."""
CHOICES = ["yes", "no", "maybe"]


def request(rng: random.Random, max_tokens: int = 60) -> tuple[str, bytes]:
    """One of both services, streamed or not, with some of what a request may ask for."""
    prompt = rng.choice(BEGINNINGS) * rng.randint(1, 3) + str(rng.randrange(100))
    sampling = random_sampling(rng, max_tokens)
    if rng.random() < 0.5:
        if rng.random() < 0.1:
            sampling["structured_outputs"] = {"choice": {"texts": CHOICES}}
        asked = generation_pb2.GenerateRequest(text=prompt, sampling=sampling, priority=rng.randint(0, 3),
                                               cache_salt=rng.choice(("", "", "a", "b")))
        name = rng.choice(("Generate", "GenerateStream"))
        return f"/jaxinfer.v1.GenerationService/{name}", asked.SerializeToString()
    if rng.random() < 0.1:
        sampling["choice"] = {"choices": CHOICES}
    stream = rng.random() < 0.5
    other = vllm_engine_pb2.GenerateRequest(text=prompt, sampling_params=sampling, stream=stream,
                                            request_id=str(rng.randrange(1000)))
    return "/vllm.grpc.engine.VllmEngine/Generate", other.SerializeToString()


def random_sampling(rng: random.Random, max_tokens: int) -> dict[str, Any]:
    sampling: dict[str, Any] = {"max_tokens": rng.randint(1, max_tokens), "temperature": rng.choice((0.0, 0.7, 1.3)),
                                "n": rng.choice((1, 1, 1, 2, 3)), "seed": rng.randrange(100)}
    options = ({"top_p": 0.9}, {"top_k": 20}, {"logprobs": 3}, {"stop": ["\n\n"]}, {"presence_penalty": 0.5},
               {"min_p": 0.05})
    for option in options:
        if rng.random() < 0.15:
            sampling |= option
    return sampling
