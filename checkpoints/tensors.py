"""Lazy tensors: a shape, a dtype and a way to read any box of it. Transformations compose without reading anything."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

type Box = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """One tensor of a checkpoint, or something made of some.

    name: what to call it in messages. read: a Box with concrete bounds and step 1, one slice a dimension, to an array
    of the box's shape in `dtype`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Box], np.ndarray]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads a box given as a slice, a tuple of slices or `...`; open ends are filled in."""
        index = index if isinstance(index, tuple) else (index,)
        return self.read(full_box(index, self.shape))


def full_box(index: Sequence[Any], shape: tuple[int, ...]) -> Box:
    """`index` with bounds for every dimension. Raises IndexError unless it holds slices of step 1 (or one `...` at
    its end).
    """
    given = [item for item in index if item is not Ellipsis]
    if len(given) > len(shape) or any(not isinstance(item, slice) or item.step not in (None, 1) for item in given):
        raise IndexError(f"{index} is no box of a tensor of shape {shape}")
    given += [slice(None)] * (len(shape) - len(given))
    return tuple(slice(*item.indices(size)) for item, size in zip(given, shape, strict=True))


def from_array(name: str, array: np.ndarray) -> LazyTensor:
    """A tensor that is in memory (or a memory map) already."""
    return LazyTensor(name, array.shape, array.dtype, lambda box: array[box])


def is_turned(array: np.ndarray) -> bool:
    """Whether the last two dimensions lie in memory in the other order, as after `transposed`."""
    return array.ndim >= 2 and array.strides[-2] < array.strides[-1] and min(array.shape[-2:]) > 1


def transposed(tensor: LazyTensor) -> LazyTensor:
    """The last two dimensions swapped: a view, since NumPy copies in the other order at 0.1 GB/s. `placement` turns
    it on the device.
    """
    *front, rows, columns = tensor.shape
    return LazyTensor(
        tensor.name,
        (*front, columns, rows),
        tensor.dtype,
        lambda box: tensor.read((*box[:-2], box[-1], box[-2])).swapaxes(-1, -2),
    )


def cast(tensor: LazyTensor, dtype: Any) -> LazyTensor:
    """Rounded to `dtype`."""
    dtype = np.dtype(dtype)
    return LazyTensor(tensor.name, tensor.shape, dtype, lambda box: tensor.read(box).astype(dtype, copy=False))


def cut(tensor: LazyTensor, axis: int, start: int, stop: int) -> LazyTensor:
    """The part from `start` to `stop` of one dimension (fused projections are cut so)."""

    def read(box: Box) -> np.ndarray:
        moved = slice(box[axis].start + start, box[axis].stop + start)
        return tensor.read((*box[:axis], moved, *box[axis + 1 :]))

    shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
    return LazyTensor(tensor.name, shape, tensor.dtype, read)


def padded(tensor: LazyTensor, axis: int, size: int) -> LazyTensor:
    """One dimension lengthened to `size` with zeros."""
    old = tensor.shape[axis]

    def read(box: Box) -> np.ndarray:
        wanted = box[axis]
        there = slice(min(wanted.start, old), min(wanted.stop, old))
        part = tensor.read((*box[:axis], there, *box[axis + 1 :]))
        missing = (wanted.stop - wanted.start) - (there.stop - there.start)
        return np.pad(part, [(0, missing if i == axis else 0) for i in range(part.ndim)])

    return LazyTensor(tensor.name, (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]), tensor.dtype, read)


def repeated(tensor: LazyTensor, axis: int, block: int, times: int) -> LazyTensor:
    """Each block of `block` entries of one dimension repeated `times` (kv heads that more shards share)."""

    def read(box: Box) -> np.ndarray:
        wanted = np.arange(box[axis].start, box[axis].stop)
        source = wanted // (block * times) * block + wanted % block
        if not len(source):
            return tensor.read((*box[:axis], slice(0, 0), *box[axis + 1 :]))
        low, high = int(source.min()), int(source.max()) + 1
        part = tensor.read((*box[:axis], slice(low, high), *box[axis + 1 :]))
        return np.take(part, source - low, axis=axis)

    shape = (*tensor.shape[:axis], tensor.shape[axis] * times, *tensor.shape[axis + 1 :])
    return LazyTensor(tensor.name, shape, tensor.dtype, read)
