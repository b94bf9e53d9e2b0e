"""Published figures of the chips that kernels are made for: what predictions and defaults are computed from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """The figures of one jax device (on tpu7x that is one of the chip's two cores).

    Fields:
      hbm_bytes, hbm_bytes_per_second: of the device's own memory.
      clock_hz: of the vector and matrix units; a bundle takes at least one cycle.
      flops_per_second: by the operands' dtype; a multiplication and an addition count as two.
      num_cores: cores that share the device and its memory; the figures are of all of them together.
    """

    kind: str
    hbm_bytes: int
    hbm_bytes_per_second: float
    clock_hz: float
    flops_per_second: dict[str, float]
    num_cores: int = 1

    def flops_per_cycle(self, dtype: str) -> float:
        """Of one core."""
        return self.flops_per_second[dtype] / self.clock_hz / self.num_cores

    @property
    def hbm_bytes_per_cycle(self) -> float:
        """Cycles of one core, bytes of the whole device."""
        return self.hbm_bytes_per_second / self.clock_hz


# TPUs: `pltpu.get_tpu_info()` of jax 0.11.2, which a test compares with this table. What it does not hold is the clock:
# peak over the matrix units' products a cycle (v5e 4 units of 128 x 128 at 1.5 GHz are 197 TFLOP/s, v6e four times as
# much a cycle at 1.75 GHz are 918), confirmed by bundles of saturated matmuls (tests/pallas_kernels/aot). v5p: a device
# is two cores, and jax reports one; the bandwidth is the vendor's 2,765 GB/s a chip (cloud.google.com/tpu/docs/v5p).
# H200: the data sheet (4.8 TB/s, dense rates of the SXM card); its clock is the boost clock.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 17_200_000_000, 820e9, 1.5e9, {"bfloat16": 197e12, "int8": 394e12}),
    "v6e": Chip("TPU v6 lite", 34_400_000_000, 1640e9, 1.75e9,
                {"bfloat16": 920e12, "int8": 1840e12, "float8_e4m3fn": 920e12}),
    "v5p": Chip("TPU v5", 103_000_000_000, 2765e9, 1.75e9, {"bfloat16": 459e12, "int8": 918e12}, num_cores=2),
    "tpu7x": Chip("TPU7x", 103_000_000_000, 3700e9, 2.2e9, {"bfloat16": 1155e12, "float8_e4m3fn": 2300e12}),
    "h200": Chip("NVIDIA H200", 150_000_000_000, 4800e9, 1.98e9,
                 {"bfloat16": 989e12, "int8": 1979e12, "float8_e4m3fn": 1979e12}, num_cores=132),
}  # fmt: skip
