"""Finding tuned blocks: the rule for a miss, and that every file of the package says what its kernels take."""

import json
from importlib import resources

import pytest

from pallas_kernels import tuning
from pallas_kernels.int8_matmul import gpu, tpu
from pallas_kernels.tuning import Entry, lookup, nearest, read, write

ENTRIES = (
    Entry("*", {}, {"block": 0}),
    Entry("TPU v5*", {"rows": 512}, {"block": 5}),
    Entry("TPU*", {"rows": 64}, {"block": 1}),
    Entry("TPU v5 lite", {"dtype": "int8", "rows": 8, "width": 128}, {"block": 50}),
    Entry("TPU v5 lite", {"dtype": "int8", "rows": 512, "width": 128}, {"block": 51}),
    Entry("TPU v5 lite", {"dtype": "bfloat16", "rows": 8}, {"block": 52}),
)


@pytest.mark.parametrize(
    ("kind", "key", "block"),
    [
        ("TPU v5 lite", {"dtype": "int8", "rows": 8, "width": 128}, 50),
        ("TPU v5 lite", {"dtype": "int8", "rows": 63, "width": 128}, 50),
        ("TPU v5 lite", {"dtype": "int8", "rows": 65, "width": 128}, 51),
        ("TPU v5 lite", {"dtype": "int8", "rows": 0, "width": 1}, 50),
        ("TPU v5 lite", {"dtype": "bfloat16", "rows": 4096, "width": 7}, 52),
        ("TPU v5 lite", {"dtype": "float32", "rows": 8}, 5),
        ("TPU v5p", {"dtype": "int8", "rows": 8}, 5),
        ("TPU v9", {}, 1),
        ("NVIDIA H200", {"rows": 8}, 0),
        ("", {}, 0),
    ],
    ids=str,
)
def test_the_most_specific_device_then_the_nearest_size(kind: str, key: dict, block: int):
    assert nearest(ENTRIES, kind, key) == {"block": block}


def test_a_miss_is_no_error():
    assert nearest((), "TPU v5 lite", {"rows": 8}) is None
    assert lookup("an operation without a file", "TPU v5 lite", rows=8) is None
    assert nearest(ENTRIES[3:], "TPU v5 lite", {"dtype": "float32"}) is None


def test_what_is_returned_may_be_changed():
    found = nearest(ENTRIES, "", {})
    assert found is not None
    found["block"] = 99
    assert nearest(ENTRIES, "", {}) == {"block": 0}


def test_what_is_written_is_read(tmp_path, monkeypatch):
    (tmp_path / tuning.FOLDER).mkdir()
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    path = tmp_path / tuning.FOLDER / "written_by_a_test.json"
    write(path, ENTRIES, {"how": "by a test"})
    assert json.loads(path.read_text())["written"] == {"how": "by a test"}
    assert sorted(read("written_by_a_test"), key=str) == sorted(ENTRIES, key=str)


@pytest.mark.parametrize("entry", read("int8_matmul"), ids=lambda entry: f"{entry.device} {dict(entry.key)}")
def test_tuned_blocks_of_the_int8_matmul_are_what_its_kernels_take(entry: Entry):
    blocks = gpu.Blocks(**entry.blocks) if entry.device.startswith("NVIDIA") else tpu.Blocks(**entry.blocks)
    assert blocks.rows % 32 == 0
    assert set(entry.key) <= {"form", "rows", "in_features"}


@pytest.mark.parametrize("entry", read("int8_matmul"), ids=lambda entry: f"{entry.device} {dict(entry.key)}")
def test_tuned_blocks_fit_the_memory_they_were_tuned_for(entry: Entry):
    if entry.device.startswith("TPU"):
        rows, width = int(entry.key["rows"]), int(entry.key["in_features"])
        tiling = tpu.choose_tiling(rows, width, 8192, 2, tpu.Blocks(**entry.blocks))
        more = tiling.rows < rows
        assert tpu.vmem_bytes(tiling.rows, tiling.out_features, width, 2, more) <= tpu.BLOCKS_BYTES
