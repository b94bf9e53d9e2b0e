"""What the tests of ragged paged attention share: running a case, and the errors of an answer."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import kv_pages_shape, ragged_paged_attention, reference
from pallas_kernels.ragged_paged_attention.cases import AttentionCase, AttentionInputs

# Largest error of a token's output relative to its largest component. bfloat16 keeps 8 bits: outputs round by 2^-9,
# that is 0.2 %, probabilities by as much before the second matmul; float32 sums of a few hundred products stay near
# 1e-6.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
SMOKE = dict.fromkeys(("kernel_mixed_everything_int8_head_128", "kernel_verify_bfloat16_head_64"), pytest.mark.smoke)
"""Of the cases that an interpreter runs, those that the next jax has to pass too."""


EVERY_CASE = os.environ.get("PALLAS_KERNELS_EVERY_CASE") == "1"
"""Whether interpreters run all cases."""


def for_interpreters(cases: list[AttentionCase]) -> list[AttentionCase]:
    """Of each option the mixed step, which has rows of every kind, and in turns the one of decoding rows alone or that
    of verifying rows alone: in an interpreter a case takes 2 to 10 s of a core.
    """
    mixed = "kernel_mixed_"
    options = [case.name.removeprefix(mixed) for case in cases if case.name.startswith(mixed)]
    left_out = {f"{'kernel_verify' if index % 2 else 'kernel_decode'}_{option}" for index, option in enumerate(options)}
    return [case for case in cases if EVERY_CASE or case.name not in left_out]


def options_of(case: AttentionCase, inputs: AttentionInputs) -> dict:
    return {
        "scale": case.head_dim**-0.5,
        "soft_cap": case.soft_cap,
        "sinks": inputs.sinks,
        "window": inputs.window,
        "k_scale": inputs.k_scale,
        "v_scale": inputs.v_scale,
        "max_q_len": case.max_q_len,
    }


def expected(case: AttentionCase, inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
    """Outputs in float64 from the rounded inputs, and the pages as they must be, byte for byte.

    The new keys and values reach the pages, and so the scores, in the pages' dtype.
    """
    queries, *rest = inputs.arguments()
    return reference.attend(queries.astype(np.float64), *rest, **options_of(case, inputs))


def run(
    case: AttentionCase, inputs: AttentionInputs, implementation: str, interpret: Any = False
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [T, N, H] and pages, back in the layout of `inputs`."""
    options = options_of(case, inputs) | {"implementation": implementation, "interpret": interpret}
    if implementation == "reference":
        outputs, pages = ragged_paged_attention(*inputs.arguments(), **options)
    else:
        positional = list(inputs.arguments())
        positional[3] = to_layout_of(implementation, case, inputs.kv_pages)
        arguments = (jnp.asarray(argument) for argument in positional)
        outputs, pages = jax.jit(lambda *arguments: ragged_paged_attention(*arguments, **options))(*arguments)
    return np.asarray(outputs), from_layout(np.asarray(pages))


def to_layout_of(implementation: str, case: AttentionCase, pages: np.ndarray) -> np.ndarray:
    """Pages [L, P, 2, K, C, H] as the implementation wants them: so, or with keys and values side by side in one lane
    axis, [L, P, 1, K, C, 2H].
    """
    shape = kv_pages_shape(*pages.shape[:2], case.page_size, case.num_kv_heads, case.head_dim, pages.dtype,
                           implementation=implementation)  # fmt: skip
    if shape == pages.shape:
        return pages
    assert shape == (*pages.shape[:2], 1, *pages.shape[3:5], 2 * case.head_dim)
    return np.concatenate([pages[:, :, :1], pages[:, :, 1:]], axis=-1)


def from_layout(pages: np.ndarray) -> np.ndarray:
    """The inverse of `to_layout_of`."""
    return pages if pages.shape[2] == 2 else np.concatenate(np.split(pages, 2, axis=-1), axis=2)


def is_kernel_shape(case: AttentionCase) -> bool:
    """What the TPU and GPU kernels promise to serve; they must refuse everything else."""
    return case.head_dim in (64, 128, 256) and 16 <= case.page_size <= 256


def error_a_token(actual: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """NumPy throughout: jnp.max of a large all-NaN float32 array can be -inf on a CPU."""
    difference = np.abs(actual.astype(np.float64) - wanted).max(axis=(1, 2))
    return difference / np.maximum(np.abs(wanted).max(axis=(1, 2)), 1e-30)


def assert_right(case: AttentionCase, inputs: AttentionInputs, outputs: np.ndarray, pages: np.ndarray) -> None:
    wanted, wanted_pages = expected(case, inputs)
    assert outputs.shape == inputs.queries.shape and outputs.dtype == inputs.queries.dtype
    assert np.isfinite(outputs.astype(np.float64)).all()
    assert error_a_token(outputs, wanted).max() <= TOLERANCE[case.dtype]
    assert (outputs[~wanted.any(axis=(1, 2))] == 0).all(), "padding and inactive rows are exactly zero"
    assert pages.dtype == inputs.kv_pages.dtype and pages.tobytes() == wanted_pages.tobytes()
