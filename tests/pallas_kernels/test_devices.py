"""Both operations serve the same chips, and refuse every other by name."""

import pytest

from pallas_kernels import int8_matmul
from pallas_kernels import ragged_paged_attention as attention
from pallas_kernels.chips import CHIPS
from pallas_kernels.dispatch import Device, Unsupported

SERVED = [("tpu", chip.kind) for name, chip in CHIPS.items() if name != "h200"] + [
    ("gpu", f"NVIDIA {name}") for name in ("H100 80GB HBM3", "H200", "H800", "H20", "GH200 480GB")
]
OTHERS = [("tpu", kind) for kind in ("TPU v2", "TPU v4", "TPU v9")] + [
    ("gpu", f"NVIDIA {name}") for name in ("A100-SXM4-80GB", "B200", "H2000")
]


def specs(device: Device) -> tuple[attention.AttentionSpec, int8_matmul.Int8MatmulSpec]:
    return (
        attention.AttentionSpec(32, 8, 128, 16, device=device),
        int8_matmul.Int8MatmulSpec(64, 4096, 4096, True, device=device),
    )


@pytest.mark.parametrize(("platform", "kind"), SERVED)
def test_a_served_chip_has_both_kernels(platform, kind):
    rows, matmul = specs(Device(platform, kind))
    assert attention.resolve(rows) == attention.resolve(rows, platform) == platform
    assert int8_matmul.resolve(matmul, platform) == platform


@pytest.mark.parametrize(("platform", "kind"), OTHERS)
def test_any_other_chip_is_served_by_xla_and_refused_by_name(platform, kind):
    rows, matmul = specs(Device(platform, kind))
    assert attention.resolve(rows) == int8_matmul.resolve(matmul) == "xla"
    for operation, spec in ((attention, rows), (int8_matmul, matmul)):
        with pytest.raises(Unsupported, match=f"{platform} cannot serve this call\n.*this is {kind}"):
            operation.resolve(spec, platform)
