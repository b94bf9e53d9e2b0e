"""Devices that programs are compiled for without being there: their topology and their published figures."""

from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies

type Platform = Literal["tpu", "cuda"]


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


@dataclass(frozen=True)
class Target:
    """Some devices of one kind. topology: as libtpu names it, or the (slices, hosts, devices) of GPUs.

    one_chip_hosts: the default of v5e and others are hosts of several chips, which no single chip can be cut from.
    """

    name: str
    platform: Platform
    topology: str
    num_devices: int
    one_chip_hosts: bool = False

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(":")[0]]

    def devices(self) -> list[Any]:
        """The devices of a description; programs can be compiled for them and not run.

        Raises RuntimeError where the packages are missing (`toolchain.missing`).
        """
        return list(self._description().devices)[: self.num_devices]

    def mesh(self, **axes: int) -> jax.sharding.Mesh:
        """A mesh of these devices with axes of these sizes; by default one axis `tensor` over all.

        Use it with `jax.set_mesh`, so that kernels see this device and not the CPU they are compiled on.
        """
        axes = axes or {"tensor": self.num_devices}
        return jax.sharding.Mesh(np.array(self.devices()).reshape(tuple(axes.values())), tuple(axes))

    def _description(self) -> Any:
        if self.platform == "cuda":
            config = resources.files(__package__).joinpath(f"{self.name.partition(':')[0]}.textproto").read_text()
            return topologies.get_topology_desc(
                platform="cuda", topology_name="", topology=self.topology, target_config=config
            )
        bounds = {"chips_per_host_bounds": (1, 1, 1)} if self.one_chip_hosts else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=self.topology, **bounds)


TARGETS = {
    target.name: target
    for target in (
        Target("v5e:1", "tpu", "v5e:1x1", 1, one_chip_hosts=True),
        Target("v5e:4", "tpu", "v5e:2x2", 4),
        Target("v5e:8", "tpu", "v5e:2x4", 8),
        Target("v6e:1", "tpu", "v6e:1x1", 1, one_chip_hosts=True),
        Target("v6e:4", "tpu", "v6e:2x2", 4),
        Target("v6e:8", "tpu", "v6e:2x4", 8),
        Target("v5p:1", "tpu", "v5p:1x1x1", 1, one_chip_hosts=True),
        Target("v5p:4", "tpu", "v5p:2x2x1", 4),
        Target("tpu7x:1", "tpu", "tpu7x:1x1x1", 1, one_chip_hosts=True),
        Target("tpu7x:8", "tpu", "tpu7x:2x2x1", 8),
        Target("h200:1", "cuda", "1x1x1", 1),
        Target("h200:8", "cuda", "1x1x8", 8),
    )
}


def target(name: str) -> Target:
    """Raises ValueError that lists the names."""
    if name not in TARGETS:
        raise ValueError(f"target {name!r} is not one of {', '.join(TARGETS)}")
    return TARGETS[name]
