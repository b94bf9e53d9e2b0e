"""Rows whose numbers are none any more: NaN or infinite. They end alone, without a token made of such numbers.

A NaN that gets into a row's keys or values was in the hidden state of its own position, which carries it on to the
last layer: so the hidden states of a prefill step and the logits of a decode step show all of them.

A round that verifies proposals computes them beside the row's own tokens, and attention to a value of NaN is NaN even
where its weight is 0: a proposal that makes NaN breaks its row, though without speculation it might never come.
"""

import jax
import jax.numpy as jnp

NOT_FINITE = -3
"""In results, in place of the token that a broken row would have had. All ids below 0 are no tokens."""


def are_finite(logits: jax.Array) -> jax.Array:
    """bool[...]: whether none of f32[..., V] is NaN or positive infinity. The largest tells, as NaN is passed on by
    `max`; samplers need it too.
    """
    return jnp.isfinite(jnp.max(logits, axis=-1))


def broken_rows(hidden: jax.Array, cu_q_lens: jax.Array) -> jax.Array:
    """bool[R]: rows some of whose packed hidden states [T, D] are not finite. cu_q_lens: i32[R + 1]."""
    broken = ~jnp.all(jnp.isfinite(hidden), axis=-1)
    so_far = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(broken, dtype=jnp.int32)])[cu_q_lens]
    return so_far[1:] > so_far[:-1]
