"""Choosing block sizes: `python -m pallas_kernels.tune` compiles or times candidates and writes `tuned/*.json`.

Where a TPU or a Hopper GPU is, candidates are timed; elsewhere they are compiled for a TPU that is not here, and the
machine code is executed in thought (`pallas_kernels.aot.tpu_execution`): such entries say "predicted".
"""

__all__: list[str] = []
