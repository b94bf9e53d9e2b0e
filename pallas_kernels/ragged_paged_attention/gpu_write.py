"""New keys and values into their pages, on Hopper: one TMA box a token for its keys, one for its values."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Shared memory a block may take for its tokens: three blocks fit an SM (227 KB), so copies of one hide another's wait.
STAGING_BYTES = 64 * 1024
# A block's slice of the destinations is copied whole: 16 bytes are the least that TMA moves, 32 tokens are 128 bytes.
MAX_TOKENS_A_BLOCK = 32
MIN_TOKENS_A_BLOCK = 4


def tokens_a_block(num_tokens: int, token_bytes: int) -> int:
    """A power of two whose keys and values fit the staging memory; never more than the step has."""
    most = max(MIN_TOKENS_A_BLOCK, min(MAX_TOKENS_A_BLOCK, STAGING_BYTES // (2 * token_bytes)))
    return min(1 << (most.bit_length() - 1), num_tokens)


def write_new(
    keys: Array, values: Array, pages_ref: Any, layer: Array, destinations: Array, *, interpret: Any = False
) -> None:
    """Writes each token's key and value to page `destination // C`, slot `destination % C` of the layer.

    Args:
      keys, values: [T, K, H] in the pages' dtype.
      pages_ref: Ref of [L, P, 2, K, C, H]; slots that no destination names keep their bytes.
      layer: i32[1].
      destinations: i32[T], -1 for a token that is not written.
    """
    num_tokens, num_kv_heads, head_dim = keys.shape
    page_size = pages_ref.shape[4]
    size = tokens_a_block(num_tokens, num_kv_heads * head_dim * keys.dtype.itemsize)
    num_blocks = -(-num_tokens // size)
    list_size = max(size, MIN_TOKENS_A_BLOCK)
    padded = jnp.full((num_blocks, list_size), -1, jnp.int32)
    whole = jnp.pad(destinations, (0, num_blocks * size - num_tokens), constant_values=-1)
    padded = padded.at[:, :size].set(whole.reshape(num_blocks, size))

    def write_block(keys_ref, values_ref, list_ref, layer_ref, pages, new_k, new_v, list_s, loaded):
        block = lax.axis_index("block")
        first = block * size
        # The last block reads from where it stays inside; the tokens before its own are another block's.
        start = jnp.minimum(first, num_tokens - size)
        plgpu.copy_gmem_to_smem(keys_ref.at[pl.ds(start, size)], new_k, loaded)
        plgpu.copy_gmem_to_smem(values_ref.at[pl.ds(start, size)], new_v, loaded)
        plgpu.copy_gmem_to_smem(list_ref.at[block], list_s, loaded)
        plgpu.barrier_wait(loaded)
        depth = layer_ref[0]

        @pl.loop(0, jnp.minimum(size, num_tokens - first))
        def _(index):
            destination = list_s[index]

            @pl.when(destination >= 0)
            def _():
                page, slot = lax.div(destination, page_size), lax.rem(destination, page_size)
                for which, new in enumerate((new_k, new_v)):
                    plgpu.copy_smem_to_gmem(new.at[first - start + index], pages.at[depth, page, which, :, slot])

        plgpu.wait_smem_to_gmem(0)

    plgpu.kernel(
        write_block,
        out_type=(),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="wg",
        scratch_types={
            "new_k": plgpu.SMEM((size, num_kv_heads, head_dim), keys.dtype),
            "new_v": plgpu.SMEM((size, num_kv_heads, head_dim), keys.dtype),
            "list_s": plgpu.SMEM((list_size,), jnp.int32),
            "loaded": plgpu.Barrier(num_arrivals=3),
        },
        interpret=interpret,
    )(keys, values, padded, layer, pages_ref)
