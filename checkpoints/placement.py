"""One tensor straight to its shards: each device's part is read alone, so the whole tensor never exists in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from checkpoints.tensors import LazyTensor, full_box, is_turned

TURNED_BY_HOST_BYTES = 4_000_000
"""Below this the host is done (40 ms) before the device has compiled a transposition."""


def place(tensor: LazyTensor, sharding: Sharding) -> jax.Array:
    """`tensor` on the devices of `sharding` (this process's ones). A part that several devices hold is read once."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    shards = []
    for device, index in sharding.addressable_devices_indices_map(tensor.shape).items():
        box = full_box(index or (), tensor.shape)
        key = tuple((item.start, item.stop) for item in box)
        if key not in parts:
            parts[key] = tensor.read(box)
        shards.append(to_device(parts[key], device))
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, shards)


def to_device(part: np.ndarray, device: Any) -> jax.Array:
    """A part on its device, in memory of its own. Large transposed views are turned there: a host does 0.1 GB/s."""
    if is_turned(part) and part.nbytes > TURNED_BY_HOST_BYTES:
        rows_first = np.require(part.swapaxes(-1, -2), requirements=["C", "ALIGNED"])
        return jnp.swapaxes(jax.device_put(rows_first, device), -1, -2)
    # A copy, since on a CPU jax may otherwise keep the mapped file itself as the array.
    return jax.device_put(np.array(part, order="C"), device)
