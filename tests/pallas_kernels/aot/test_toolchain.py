"""Jobs: their environment, results and failures, without any compiler; and the targets with one."""

import pytest

from pallas_kernels.aot import toolchain
from pallas_kernels.aot.targets import TARGETS, target
from pallas_kernels.chips import CHIPS
from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import WIDE

JOBS = "tests.pallas_kernels.aot.test_toolchain"
needs_tpu = pytest.mark.skipif(toolchain.missing("tpu") is not None, reason=str(toolchain.missing("tpu")))
needs_cuda = pytest.mark.skipif(toolchain.missing("cuda") is not None, reason=str(toolchain.missing("cuda")))


def add(left: int, right: int, dump_folder: str | None = None) -> list:
    print("printed by the job")
    return [left + right, dump_folder is not None]


def fail() -> None:
    raise ValueError("too large by 3 bytes")


def leave() -> None:
    raise SystemExit(7)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder that looks like the one with the packages."""
    (tmp_path / "tpu" / "libtpu").mkdir(parents=True)
    monkeypatch.setenv(toolchain.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_job_returns_its_value_and_what_it_printed(packages):
    finished = toolchain.run(f"{JOBS}:add", {"left": 2, "right": 3}, "tpu", dump=True)
    assert finished.value == [5, True]
    assert "printed by the job" in finished.log


def test_a_job_that_raises_is_an_error_with_its_message(packages):
    with pytest.raises(toolchain.JobFailed, match="ValueError: too large by 3 bytes") as caught:
        toolchain.run(f"{JOBS}:fail", {}, "tpu")
    assert caught.value.kind == "ValueError"


def test_a_job_that_ends_without_a_result_is_an_error(packages):
    with pytest.raises(toolchain.JobFailed, match="exit status 7"):
        toolchain.run(f"{JOBS}:leave", {}, "tpu")


def test_packages_come_first_and_the_callers_own_paths_stay(packages, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/of/the/caller")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    environment = toolchain.environment("tpu", packages)
    paths = environment["PYTHONPATH"].split(":")
    assert paths[0] == str(packages / "tpu") and "/somewhere/of/the/caller" in paths
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert "XLA_FLAGS" not in environment
    assert str(packages) in environment["LIBTPU_INIT_ARGS"]


def test_missing_packages_are_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv(toolchain.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setitem(toolchain.MARKS, "tpu", "a_package_that_nobody_has")
    with pytest.raises(FileNotFoundError, match="make aot-packages"):
        toolchain.run(f"{JOBS}:add", {"left": 2, "right": 3}, "tpu")


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'v9:1' is not one of v5e:1, .*h200:1"):
        target("v9:1")


def describe(names: list[str]) -> dict:
    """The job: what jax says of targets."""
    import jax
    from jax.experimental.pallas import tpu as pltpu

    found = {}
    for name in names:
        mesh = target(name).mesh()
        devices = list(mesh.devices.flat)
        found[name] = {"kind": devices[0].device_kind, "devices": len(devices), "axes": list(mesh.axis_names)}
        if TARGETS[name].platform == "tpu":
            with jax.set_mesh(mesh):
                info = pltpu.get_tpu_info()
            found[name] |= {"hbm": info.hbm_capacity_bytes, "bandwidth": info.mem_bw_bytes_per_second,
                            "bfloat16": info.bf16_ops_per_second, "int8": info.int8_ops_per_second,
                            "matrix_width": info.mxu_column_size}  # fmt: skip
    return found


@needs_tpu
def test_tpu_targets_answer_and_the_table_of_chips_is_what_jax_says():
    names = [name for name, each in TARGETS.items() if each.platform == "tpu"]
    for name, found in toolchain.run(f"{JOBS}:describe", {"names": names}, "tpu").value.items():
        chip = target(name).chip
        assert (found["kind"], found["devices"], found["axes"]) == (chip.kind, target(name).num_devices, ["tensor"])
        assert chip.kind.startswith(WIDE) == (found["matrix_width"] > 128)
        if chip == CHIPS["v5p"]:
            continue  # jax describes one of its two cores
        assert (found["hbm"], found["bandwidth"]) == (chip.hbm_bytes, chip.hbm_bytes_per_second)
        for dtype in {"bfloat16", "int8"} & set(chip.flops_per_second):
            assert found[dtype] == chip.flops_per_second[dtype]


@needs_cuda
def test_gpu_targets_answer():
    found = toolchain.run(f"{JOBS}:describe", {"names": ["h200:1", "h200:8"]}, "cuda").value
    assert {name: (each["kind"], each["devices"]) for name, each in found.items()} == {
        "h200:1": ("NVIDIA H200", 1), "h200:8": ("NVIDIA H200", 8)}  # fmt: skip
