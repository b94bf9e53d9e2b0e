"""torch's attention as the peer: dense keys and values, every backend that takes the load, replayed as CUDA graphs.

Dense contiguous rows are the peer's advantage: it follows no page table and writes no new key or value.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.h200.attention import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SCALE, Load
from benchmarks.h200.contenders import Contender

type Attend = Callable[[Any, Any, Any], Any]
"""Queries [B, N, Q, H], keys and values [B, K, S, H] to outputs like the queries."""


def peer() -> Any:
    """torch, or None and a word on stdout where it cannot be imported or sees no card."""
    try:
        torch = importlib.import_module("torch")
        torch.cuda.init()
    except Exception as error:  # a driver, a missing library, no torch at all
        print(f"torch does not run here: {type(error).__name__}: {str(error)[:160]}")
        return None
    return torch


def contenders(load: Load) -> list[Contender]:
    """One for each way of torch's that runs the load; the others say on stdout why not."""
    torch = peer()
    if torch is None:
        return []
    rows, q_len, longest = len(load.kv_lens), max(load.q_lens), max(load.kv_lens)
    torch.manual_seed(0)
    shape = (load.num_layers, rows, NUM_KV_HEADS, longest, HEAD_DIM)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    queries = torch.randn((rows, NUM_HEADS, q_len, HEAD_DIM), dtype=torch.bfloat16, device="cuda")
    mask = None
    if min(load.kv_lens) < longest:
        lens = torch.tensor(load.kv_lens, device="cuda")
        mask = (torch.arange(longest, device="cuda") < lens[:, None])[:, None, None, :]
    # Flash attention takes no mask.
    backends = ("FLASH_ATTENTION" if mask is None else "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    ways: dict[str, Callable[[], Attend]] = {
        f"torch SDPA {name.lower()}": partial(sdpa, torch, name, q_len > 1, mask) for name in backends
    }
    ways["torch flex"] = partial(flex, torch, load)
    found = []
    for name, way in ways.items():
        try:
            found.append(graph(torch, name, way(), queries, keys, values))
        except Exception as error:  # a backend refuses in many ways; the others still run
            print(f"{name} does not run {load.name}: {type(error).__name__}: {str(error)[:160]}")
    return found


def sdpa(torch: Any, backend: str, causal: bool, mask: Any) -> Attend:
    attention = importlib.import_module("torch.nn.attention")

    def attend(queries: Any, keys: Any, values: Any) -> Any:
        with attention.sdpa_kernel([getattr(attention.SDPBackend, backend)]):
            return torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=causal, scale=SCALE, enable_gqa=True
            )

    return attend


def flex(torch: Any, load: Load) -> Attend:
    """Compiled flex_attention with a block mask of the rows' lengths, or of the diagonal."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(module.flex_attention, dynamic=False)
    lens = torch.tensor(load.kv_lens, device="cuda")
    q_len, longest = max(load.q_lens), max(load.kv_lens)

    def within(row: Any, head: Any, query: Any, key: Any) -> Any:
        return key < lens[row] if q_len == 1 else key <= query

    mask = module.create_block_mask(within, len(load.kv_lens) if q_len == 1 else None, None, q_len, longest)

    def attend(queries: Any, keys: Any, values: Any) -> Any:
        return compiled(queries, keys, values, block_mask=mask, scale=SCALE, enable_gqa=True)

    return attend


def graph(torch: Any, name: str, attend: Attend, queries: Any, keys: Any, values: Any) -> Contender:
    """A pass over all layers as one CUDA graph, so that the host costs nothing."""

    def one_pass() -> Any:
        out = queries
        for layer in range(keys.shape[0]):
            out = attend(out, keys[layer], values[layer])
        return out

    captured = capture(torch, one_pass)
    return Contender(name, captured.replay, torch.cuda.synchronize)


def capture(torch: Any, one_pass: Callable[[], Any]) -> Any:
    """The graph of `one_pass`, after it ran three times on a side stream as capturing demands."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            one_pass()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        one_pass()
    return captured
