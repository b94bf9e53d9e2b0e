"""Pallas' interpreters as the tests use them: every race an error, uninitialised memory NaN.

The one file of the project that reads private jax modules: the interpreters publish their race flag nowhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

type DmaMode = Literal["on_wait", "eager"]
# A missing wait shows as NaN when copies run at their wait, and as a race when they run at their start: tests run both.
DMA_MODES: tuple[DmaMode, ...] = ("on_wait", "eager")


@contextmanager
def tpu_interpreter_without_races(dma_mode: DmaMode = "on_wait") -> Iterator[Any]:
    """Parameters for calls inside the block; at its end no race may have been found."""
    try:
        yield pltpu.InterpretParams(
            detect_races=True,
            uninitialized_memory="nan",
            out_of_bounds_reads="raise",
            dma_execution_mode=dma_mode,
        )
        races = tpu_interpreter.races
        assert races is None or not races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@contextmanager
def gpu_interpreter_without_races() -> Iterator[Any]:
    """Parameters for calls inside the block; at its end no race may have been found."""
    try:
        yield plgpu.InterpretGPUParams(detect_races=True)
        assert not gpu_interpreter.get_races().races_found
    finally:
        gpu_interpreter.reset_gpu_interpret_mode_state()
