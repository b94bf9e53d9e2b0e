"""The chips that the kernels are made for, by the names jax gives them; every other is refused by name."""

import re

from pallas_kernels.dispatch import Device

# One device of these kinds is two cores, each of which runs its share of a parallel grid axis.
TWO_CORES = ("TPU v5", "TPU v5p")
INT8_MATRIX_UNIT = ("TPU v5 lite", "TPU v5e", *TWO_CORES, "TPU v6 lite", "TPU v6e")
TPUS = (*INT8_MATRIX_UNIT, "TPU7x", "TPU7")
# Compute capability 9.0 in NVIDIA's list of CUDA GPUs, as drivers name the cards ("NVIDIA H100 80GB HBM3").
HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")


def tpu_reasons(device: Device, interpret: bool) -> list[str]:
    """Why a Mosaic TPU kernel cannot run there."""
    if interpret or (device.platform == "tpu" and device.kind in TPUS):
        return []
    if device.platform != "tpu":
        return [f"runs on TPUs, this is {device.platform}"]
    return [f"compiled for {', '.join(TPUS)} only, this is {device.kind}"]


def hopper_reasons(device: Device, interpret: bool) -> list[str]:
    """Why a Mosaic GPU kernel cannot: wgmma and TMA as the kernels use them exist on compute capability 9.0 alone."""
    if interpret or (device.platform == "gpu" and HOPPER.search(device.kind)):
        return []
    if device.platform != "gpu":
        return [f"runs on Hopper GPUs (sm_90a), this is {device.platform}"]
    return [f"Hopper only (sm_90a), this is {device.kind}"]
