"""The cases of the test suite on the card, against the float64 reference, before anything is measured."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Unsupported, int8_matmul, ragged_paged_attention
from pallas_kernels.int8_matmul import cases as matmul_cases
from pallas_kernels.ragged_paged_attention import cases as attention_cases
from pallas_kernels.ragged_paged_attention import reference as attention_reference
from pallas_kernels.ragged_paged_attention.cases import AttentionCase

TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-2}
"""Largest error of an output row relative to its largest component: bfloat16 rounds outputs and probabilities by 2^-9,
the card's float32 products run in TF32, which keeps 10 bits."""
COMPILERS = 4
"""Programs compiled at a time in each of a few processes; the machine has 16 cores."""

type Check = Callable[[], str | None]
"""Compiled on one thread of many, then run: None, or what is wrong."""


def failures(shard: int = 0, shards: int = 1) -> tuple[int, list[str]]:
    """How many cases ran, and what went wrong, a line a case; of all cases every `shards`-th from `shard` on."""
    prepare = [(f"attention {case.name}", attention_check, case) for case in attention_cases.CASES
               if case.name.startswith("kernel_")]  # fmt: skip
    prepare += [(f"int8 matmul {case.name} {'W8A8' if quantize else 'weight-only'}", matmul_check, (case, quantize))
                for case in matmul_cases.CASES for quantize in (True, False)]  # fmt: skip
    prepare = prepare[shard::shards]
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = list(pool.map(lambda job: (job[0], prepared(job[1], job[2])), prepare))
    wrong, ran = [], 0
    for number, (name, check) in enumerate(compiled, 1):
        # Before it runs: what a fault ends is the last one named.
        print(f"correctness {shard}, {number} of {len(compiled)}: {name}", file=sys.stderr, flush=True)
        if isinstance(check, str):
            print(f"{name}: not served: {check}")
            continue
        ran += 1
        found = checked(check)
        wrong += [] if found is None else [f"{name}: {found}"]
    return ran, wrong


def checked(check: Check) -> str | None:
    try:
        return check()
    except Exception as error:  # a launch that the driver refuses: the other cases still run
        return f"{type(error).__name__}: {str(error)[:200]}"


def prepared(make: Callable[[Any], Check], case: Any) -> Check | str:
    """The check, or the reason why the kernel refuses the case; a compile that fails is a check that says so."""
    try:
        return make(case)
    except Unsupported as error:
        return "; ".join(error.reasons.get("gpu", ("refused",)))
    except Exception as error:  # what a compiler raises is no fixed type
        said = f"{type(error).__name__}: {str(error)[:200]}"
        return lambda: said


def attention_check(case: AttentionCase) -> Check:
    inputs = attention_cases.make_inputs(case)
    options: dict[str, Any] = {
        "scale": case.head_dim**-0.5, "soft_cap": case.soft_cap, "sinks": inputs.sinks, "window": inputs.window,
        "k_scale": inputs.k_scale, "v_scale": inputs.v_scale, "max_q_len": case.max_q_len,
    }  # fmt: skip
    arguments = [jnp.asarray(argument) for argument in inputs.arguments()]
    attend = jax.jit(lambda *a: ragged_paged_attention.ragged_paged_attention(*a, **options, implementation="gpu"))
    compiled = attend.lower(*arguments).compile()

    def check() -> str | None:
        outputs, pages = (np.asarray(x) for x in compiled(*arguments))
        queries, *rest = inputs.arguments()
        wanted, wanted_pages = attention_reference.attend(queries.astype(np.float64), *rest, **options)
        if pages.tobytes() != wanted_pages.tobytes():
            return "pages differ"
        return wrong_rows(outputs.reshape(outputs.shape[0], -1), wanted.reshape(outputs.shape[0], -1), case.dtype)

    return check


def matmul_check(job: tuple[matmul_cases.Int8MatmulCase, bool]) -> Check:
    case, quantize = job
    x, values, scale = matmul_cases.make_inputs(case)
    arguments = [jnp.asarray(argument) for argument in (x, values, scale)]
    layer = matmul_cases.layer_of(case)
    multiply = jax.jit(lambda *a: int8_matmul.int8_matmul(
        *a, layer=layer, quantize_activations=quantize, out_dtype=case.out_dtype, implementation="gpu"))  # fmt: skip
    compiled = multiply.lower(*arguments).compile()

    def check() -> str | None:
        flat = x.reshape(-1, x.shape[-1])
        wanted = np.asarray(int8_matmul.int8_matmul(flat, values, scale, layer=layer, quantize_activations=quantize,
                                                    out_dtype=np.float64, implementation="reference"))  # fmt: skip
        return wrong_rows(np.asarray(compiled(*arguments)).reshape(wanted.shape), wanted, case.dtype)

    return check


def wrong_rows(actual: np.ndarray, wanted: np.ndarray, dtype: str) -> str | None:
    """NumPy throughout: a comparison with NaN must fail."""
    if actual.size == 0:
        return None
    error = np.abs(actual.astype(np.float64) - wanted).max(axis=1) / np.maximum(np.abs(wanted).max(axis=1), 1e-30)
    good = error <= TOLERANCE[dtype]
    return None if good.all() else f"{(~good).sum()} of {good.size} rows, worst error {np.max(error):.3g}"


def names(wrong: Sequence[str], most: int = 20) -> str:
    """The first few, and how many more."""
    more = f"\n... and {len(wrong) - most} more" if len(wrong) > most else ""
    return "\n".join(wrong[:most]) + more
