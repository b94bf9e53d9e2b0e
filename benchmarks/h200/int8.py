"""The int8 matmul on the card: activations quantised in the call, against torch's integer product plus scales."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.h200.contenders import Contender, of_jax
from benchmarks.h200.torch_attention import capture, peer
from pallas_kernels.int8_matmul import int8_matmul

IN_FEATURES = OUT_FEATURES = 4096


def ours(rows: int, num_weights: int, implementation: str | None, *, quantize_activations: bool = True) -> Contender:
    """A pass is a chain of `num_weights` products, each fed by the one before, through weights of their own."""
    keys = jax.random.split(jax.random.key(0), 2)
    # A buffer a weight: of a stack a kernel's slice would be copied before the call.
    values = [jax.random.randint(key, (OUT_FEATURES, IN_FEATURES), -127, 128, jnp.int8)
              for key in jax.random.split(keys[0], num_weights)]  # fmt: skip
    scale = jnp.full((OUT_FEATURES,), 1 / (73 * IN_FEATURES**0.5), jnp.float32)  # keeps the variance of x near 1
    x = jax.random.normal(keys[1], (rows, IN_FEATURES), jnp.bfloat16)

    @jax.jit
    def step(x: jax.Array, values: list[jax.Array]) -> jax.Array:
        for weight in values:
            x = jnp.asarray(int8_matmul(x, weight, scale, quantize_activations=quantize_activations,
                                        implementation=implementation))  # fmt: skip
        return x

    return of_jax(f"ours ({implementation or 'default'})", lambda x: step(x, values), x)


def torch_int_mm(rows: int, num_weights: int) -> list[Contender]:
    """The same chain: absmax, quantise, `_int_mm`, scales; compiled by torch (fused around the product) and eager."""
    torch = peer()
    if torch is None:
        return []
    weights = torch.randint(-127, 128, (num_weights, OUT_FEATURES, IN_FEATURES), dtype=torch.int8, device="cuda")
    scale = torch.full((OUT_FEATURES,), 1 / (73 * IN_FEATURES**0.5), device="cuda")
    x = torch.randn((rows, IN_FEATURES), dtype=torch.bfloat16, device="cuda")

    def linear(x: Any, weight: Any) -> Any:
        x_scale = x.abs().amax(dim=-1, keepdim=True).float() / 127
        quantized = torch.round(x.float() / x_scale.clamp(min=1e-30)).to(torch.int8)
        return (torch._int_mm(quantized, weight.t()).float() * x_scale * scale).to(torch.bfloat16)

    found = []
    ways: dict[str, Callable[[], Any]] = {
        "torch eager": lambda: linear, "torch compiled": lambda: torch.compile(linear, dynamic=False)
    }  # fmt: skip
    for name, make in ways.items():
        try:
            way = make()

            def one_pass(way: Any = way) -> Any:
                out = x
                for weight in weights:
                    out = way(out, weight)
                return out

            found.append(Contender(name, capture(torch, one_pass).replay, torch.cuda.synchronize))
        except Exception as error:  # a way that this version lacks; the other still runs
            print(f"{name} does not run {rows} rows: {type(error).__name__}: {str(error)[:160]}")
    return found
