"""int8 weights times activations: the contract (`api`) and its implementations."""

from pallas_kernels.int8_matmul.api import explain, int8_matmul, quantize_weight, resolve
from pallas_kernels.int8_matmul.contract import Int8MatmulSpec

__all__ = ["Int8MatmulSpec", "explain", "int8_matmul", "quantize_weight", "resolve"]
