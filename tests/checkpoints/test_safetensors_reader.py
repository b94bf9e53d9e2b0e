"""Reading safetensors: right, lazily, and never trusting a file."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from checkpoints import CheckpointError, safetensors_reader
from checkpoints.safetensors_reader import INDEX_FILE, SINGLE_FILE, open_safetensors

ARRAYS = {
    "matrix": np.arange(24, dtype=np.float32).reshape(4, 6),
    "half": np.arange(6, dtype=np.float16),
    "brain": np.arange(8).astype(ml_dtypes.bfloat16).reshape(2, 4),
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(shape=(2,), begin=0, end=8, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_every_dtype_and_shape_comes_back(tmp_path):
    save_file(ARRAYS, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    tensors = open_safetensors(tmp_path)
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (tensors[name].shape, tensors[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(tensors[name][...], array)


def test_a_box_is_read_alone(tmp_path):
    save_file(ARRAYS, tmp_path / SINGLE_FILE)
    matrix = open_safetensors(tmp_path)["matrix"]
    np.testing.assert_array_equal(matrix[1:3, 2:5], ARRAYS["matrix"][1:3, 2:5])
    part = matrix[0:1]
    assert isinstance(part, np.memmap) and part.nbytes == 24
    with pytest.raises(IndexError, match="no box"):
        matrix[::2]


def test_shards_are_found_through_the_index(tmp_path):
    write_sharded(tmp_path, {"matrix": "one.safetensors", "half": "two.safetensors"})
    tensors = open_safetensors(tmp_path)
    np.testing.assert_array_equal(tensors["half"][...], ARRAYS["half"])
    assert tensors.keys() == {"matrix", "half"}


def write_sharded(folder: Path, weight_map: dict[str, str]) -> None:
    save_file({"matrix": ARRAYS["matrix"]}, folder / "one.safetensors")
    save_file({"half": ARRAYS["half"]}, folder / "two.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("shard", "problem"),
    [
        ("../outside.safetensors", "not a plain name"),
        ("/etc/passwd", "not a plain name"),
        ("sub/one.safetensors", "not a plain name"),
        ("..", "not a plain name"),
        ("", "not a plain name"),
        ("missing.safetensors", "is missing"),
        ("link.safetensors", "is a link out of the folder"),
        ("folder.safetensors", "not a regular file"),
        ("two.safetensors", "'matrix', but it does not"),
    ],
)
def test_an_index_may_only_name_files_of_its_folder(tmp_path, shard, problem):
    folder = tmp_path / "model"
    (folder / "folder.safetensors").mkdir(parents=True)
    save_file({"matrix": ARRAYS["matrix"]}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    write_sharded(folder, {"matrix": shard})
    with pytest.raises(CheckpointError, match=problem):
        open_safetensors(folder)


def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"half": ARRAYS["half"]}, blobs / "0123")
    (snapshot / SINGLE_FILE).symlink_to(Path("../../blobs/0123"))
    assert open_safetensors(snapshot).keys() == {"half"}


@pytest.mark.parametrize("weight_map", [None, [], {"matrix": 3}])
def test_an_index_without_a_map_is_refused(tmp_path, weight_map):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map"):
        open_safetensors(tmp_path)


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        open_safetensors(tmp_path)


MALFORMED = {
    "no header": (lambda path: path.write_bytes(b"123"), "too few for a header"),
    "header longer than file": (lambda path: write(path, {}, length=1000), "only 2 follow"),
    "header over the limit": (lambda path: write(path, {}, length=2**40), "more than the limit"),
    "not JSON": (lambda path: write(path, b"{oops"), "not valid JSON"),
    "not UTF-8": (lambda path: write(path, b"\xff\xfe{}"), "not valid JSON"),
    "not an object": (lambda path: write(path, [1]), "not a JSON object"),
    "nested too deep": (lambda path: write(path, b"[" * 100_000), "not valid JSON"),
    "a key twice": (lambda path: write(path, b'{"a": {}, "a": {}}'), "twice"),
    "entry no object": (lambda path: write(path, {"a": 3}), "not described"),
    "no dtype": (lambda path: write(path, {"a": {"shape": [2], "data_offsets": [0, 8]}}), "dtype None"),
    "fp8": (lambda path: write(path, {"a": entry(dtype="F8_E4M3")}, bytes(8)), "F8_E4M3.*need their scales"),
    "unknown dtype": (lambda path: write(path, {"a": entry(dtype="Q4")}, bytes(8)), "Q4"),
    "unhashable dtype": (lambda path: write(path, {"a": entry(dtype=[1])}, bytes(8)), "dtype"),
    "negative shape": (lambda path: write(path, {"a": entry(shape=(-2,))}, bytes(8)), "invalid shape"),
    "huge shape": (lambda path: write(path, {"a": entry(shape=(2**62,))}, bytes(8)), "invalid shape"),
    "product overflows": (lambda path: write(path, {"a": entry(shape=(2**40, 2**40))}, bytes(8)), "needs"),
    "fractional shape": (lambda path: write(path, {"a": entry(shape=(2.0,))}, bytes(8)), "invalid shape"),
    "boolean shape": (lambda path: write(path, {"a": entry(shape=(True,))}, bytes(8)), "invalid shape"),
    "too many dimensions": (lambda path: write(path, {"a": entry(shape=(1,) * 9, end=4)}, bytes(4)), "invalid shape"),
    "offsets backwards": (lambda path: write(path, {"a": entry(begin=8, end=0)}, bytes(8)), "data_offsets"),
    "three offsets": (
        lambda path: write(path, {"a": {**entry(), "data_offsets": [0, 4, 8]}}, bytes(8)),
        "data_offsets",
    ),
    "size differs": (lambda path: write(path, {"a": entry(shape=(3,))}, bytes(8)), "needs 12 bytes"),
    "overlap": (lambda path: write(path, {"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), "begins at byte 4"),
    "same bytes twice": (lambda path: write(path, {"a": entry(), "b": entry()}, bytes(8)), "begins at byte 0"),
    "gap": (lambda path: write(path, {"a": entry(begin=4, end=12)}, bytes(12)), "begins at byte 4"),
    "truncated data": (lambda path: write(path, {"a": entry()}, bytes(7)), "truncated"),
    "tail": (lambda path: write(path, {"a": entry()}, bytes(9)), "tail"),
    "offsets beyond": (lambda path: write(path, {"a": entry(shape=(2**40,), end=2**42)}, bytes(8)), "truncated"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_a_typed_error_that_names_it(tmp_path, name):
    make, problem = MALFORMED[name]
    make(tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_safetensors(tmp_path)
    assert caught.value.path == str(tmp_path / SINGLE_FILE)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
IMPOSTORS = {
    "a git-LFS pointer": (LFS_POINTER, "is a git-LFS pointer.*`git lfs pull`"),
    "a page": (b"<!DOCTYPE html>\n<html>\n<head><title>404</title>", "is an HTML page.*download it again"),
    "a page behind blank lines": (b"\xef\xbb\xbf\r\n\r\n   <HTML><body>Sign in</body></HTML>", "is an HTML page"),
    "other text": (b"Access to this model is restricted", "more than the limit"),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_what_a_failed_download_leaves_is_recognised(tmp_path, name):
    content, problem = IMPOSTORS[name]
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_safetensors(tmp_path)
    assert caught.value.path == str(tmp_path / SINGLE_FILE)


def test_an_index_that_is_a_pointer_is_recognised_too(tmp_path):
    (tmp_path / INDEX_FILE).write_bytes(LFS_POINTER)
    with pytest.raises(CheckpointError, match="is a git-LFS pointer"):
        open_safetensors(tmp_path)


def test_a_file_of_too_many_tensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_reader, "MAX_TENSORS_PER_FILE", 2)
    write(tmp_path / SINGLE_FILE, {name: entry(shape=(0,), end=0) for name in "abc"})
    with pytest.raises(CheckpointError, match="3 tensors, more than the limit 2"):
        open_safetensors(tmp_path)


@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 60))
def test_any_damage_gives_a_tensor_or_a_typed_error(tmp_path_factory, position, value, cut):
    folder = tmp_path_factory.mktemp("damaged")
    save_file({name: ARRAYS[name] for name in ("matrix", "half")}, folder / SINGLE_FILE)
    raw = bytearray((folder / SINGLE_FILE).read_bytes())
    raw[position % len(raw)] = value
    (folder / SINGLE_FILE).write_bytes(raw[: len(raw) - cut])
    try:
        for tensor in open_safetensors(folder).values():
            assert tensor[...].shape == tensor.shape
    except CheckpointError:
        pass
