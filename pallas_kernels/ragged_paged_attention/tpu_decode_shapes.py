"""Static sizes of the TPU kernel for rows of one query, and its operands as it wants them."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.ragged_paged_attention.contract import Options
from pallas_kernels.ragged_paged_attention.tpu_schedule import PAGES_A_CHUNK

NUM_LANES, NUM_SUBLANES = 128, 8
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class DecodeBlocks:
    """Block sizes.

    Fields:
      kv: tokens of context computed at once, a power of two of at least 128.
      depth: blocks in VMEM, a power of two of at least 2: `depth - 1` are in flight while one is computed.
    """

    kv: int
    depth: int


@dataclass(frozen=True)
class Geometry:
    """Static sizes of a call.

    Fields:
      kv, depth: see `DecodeBlocks`, `kv` cut to what a row can hold.
      page_size: C; num_parts, num_kv_heads, width: S, K, W of pages [L, P, S, K, C, W].
      group_rows: tokens of the smallest piece of a page that a copy may move.
      heads_a_tile: kv heads whose query heads share a tile of queries; num_tiles: their number.
      group: G; tile_rows: rows of a tile, heads_a_tile * G rounded up to whole sublane tiles.
      compute_dtype: of both matmuls' operands.
      num_cores: that share the rows.
    """

    kv: int
    depth: int
    page_size: int
    num_parts: int
    num_kv_heads: int
    width: int
    group_rows: int
    heads_a_tile: int
    group: int
    compute_dtype: Any
    num_cores: int

    @property
    def num_pages(self) -> int:
        return self.kv // self.page_size

    @property
    def num_tiles(self) -> int:
        return self.num_kv_heads // self.heads_a_tile

    @property
    def tile_rows(self) -> int:
        return -(-self.heads_a_tile * self.group // NUM_SUBLANES) * NUM_SUBLANES


def group_rows(page_size: int, dtype) -> int:
    """Rows of a tile of `dtype` in memory (8 x 32 bits), or a page where that is less."""
    return min(page_size, NUM_SUBLANES * 4 // jnp.dtype(dtype).itemsize)


def heads_a_tile(num_kv_heads: int, group: int) -> int:
    """The most kv heads whose query heads fit into one sublane tile together."""
    fitting = [n for n in range(1, NUM_SUBLANES + 1) if num_kv_heads % n == 0 and n * group <= NUM_SUBLANES]
    return max(fitting, default=1)


def make_geometry(queries: Array, kv_pages: Array, max_pages: int, blocks: DecodeBlocks, num_cores: int) -> Geometry:
    _, _, num_parts, num_kv_heads, page_size, width = kv_pages.shape
    group = queries.shape[1] // num_kv_heads
    longest = 1 << (max_pages * page_size - 1).bit_length()
    wide = jnp.float32 in (queries.dtype, kv_pages.dtype)
    return Geometry(
        kv=max(min(blocks.kv, longest, PAGES_A_CHUNK * page_size), NUM_LANES, page_size),
        depth=blocks.depth,
        page_size=page_size,
        num_parts=num_parts,
        num_kv_heads=num_kv_heads,
        width=width,
        group_rows=group_rows(page_size, kv_pages.dtype),
        heads_a_tile=heads_a_tile(num_kv_heads, group),
        group=group,
        compute_dtype=jnp.dtype(jnp.float32 if wide else queries.dtype),
        num_cores=num_cores,
    )


# ---- arrays as the kernel wants them ---------------------------------------------------------------------------------


def to_tiles(by_head: Array, geometry: Geometry) -> Array:
    """[.., N, x] to [.., num_tiles, tile_rows, x], zeros behind a tile's heads."""
    used = geometry.heads_a_tile * geometry.group
    tiles = by_head.reshape(*by_head.shape[:-2], geometry.num_tiles, used, by_head.shape[-1])
    spare = geometry.tile_rows - used
    return jnp.pad(tiles, [(0, 0)] * (tiles.ndim - 2) + [(0, spare), (0, 0)]) if spare else tiles


def from_tiles(tiles: Array, geometry: Geometry, head_dim: int) -> Array:
    """The inverse of `to_tiles` for outputs; a head's are the last `head_dim` lanes."""
    used = tiles[..., : geometry.heads_a_tile * geometry.group, geometry.width - head_dim :]
    return used.reshape(*tiles.shape[:-3], -1, head_dim)


def to_words(new_kv: Array) -> Array:
    """[T, S, K, W] to u32[T, S * K, W]: each element as often as a word holds it, so that a row of words spread over
    sublanes is a row of elements spread over all rows of a tile.
    """
    bits = jnp.dtype(new_kv.dtype).itemsize * 8
    words = lax.bitcast_convert_type(new_kv, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    words = words * jnp.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return words.reshape(words.shape[0], -1, words.shape[-1])


def constants(options: Options, geometry: Geometry) -> dict[str, Array]:
    """f32[num_tiles, tile_rows, 128] of what differs between heads."""
    num_heads = geometry.num_kv_heads * geometry.group
    by_head = {}
    if options.sinks is not None:
        by_head["sinks"] = options.sinks * LOG2_E
    for name, scale in (("k_scale", options.k_scale), ("v_scale", options.v_scale)):
        if scale is not None:
            by_head[name] = jnp.repeat(jnp.broadcast_to(scale, (geometry.num_kv_heads,)), geometry.group)
    return {
        name: to_tiles(jnp.broadcast_to(value[:, None], (num_heads, NUM_LANES)), geometry)
        for name, value in by_head.items()
    }
