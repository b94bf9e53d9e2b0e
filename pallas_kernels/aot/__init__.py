"""Proving kernels without the device: compile for it, read its machine code, registers and memory.

`python -m pallas_kernels.aot` prints the table of one call. Everything from here is compiled for or predicted, never
measured.
"""

__all__: list[str] = []
