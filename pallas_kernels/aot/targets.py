"""Devices that programs are compiled for without being there: their topology."""

from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.chips import CHIPS, Chip

type Platform = Literal["tpu", "cuda"]


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
