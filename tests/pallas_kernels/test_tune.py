"""The tool that writes tuned blocks: candidates, choosing, files, and what the kernels make of them."""

import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.aot import toolchain
from pallas_kernels.dispatch import Device
from pallas_kernels.ragged_paged_attention import gpu, gpu_blocks, gpu_units, tpu
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec
from pallas_kernels.ragged_paged_attention.gpu_prefill_unit import PrefillBlocks
from pallas_kernels.ragged_paged_attention.tpu_decode import DecodeBlocks
from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import (
    capped,
    default_units,
    prefill_blocks,
    prefill_key,
)
from pallas_kernels.tune import __main__ as tool
from pallas_kernels.tune import timing
from pallas_kernels.tune.calls import Call
from pallas_kernels.tune.choosing import Trial, table, winner
from pallas_kernels.tune.operations import DECODE, GPU_DECODE, GPU_PREFILL, MATMUL, OPERATIONS, PREFILL, matching
from pallas_kernels.tuning import Entry

needs_tpu = pytest.mark.skipif(toolchain.missing("tpu") is not None, reason=str(toolchain.missing("tpu")))
V6E = Device("tpu", "TPU v6 lite")


def trial(kv: int, cost: float, bundles: int = 0, spilling: float = 0.0, error: str = "") -> Trial:
    return Trial({"kv": kv}, cost, bundles, spilling, error)


@pytest.mark.parametrize(
    ("trials", "kv"),
    [
        ([trial(256, 120.0), trial(512, 100.0)], 512),
        ([trial(256, 100.9, 80), trial(512, 100.0, 90)], 256),
        ([trial(256, 102.0, 80), trial(512, 100.0, 90)], 512),
        ([trial(256, 100.0, 80), trial(512, 100.0, 84)], 512),
        ([trial(256, 100.0, 80), trial(512, 100.0, 85)], 256),
        ([trial(256, 120.0, spilling=0.05), trial(512, 100.0, spilling=0.051)], 256),
        ([trial(256, 120.0, spilling=0.06), trial(512, 100.0, spilling=0.07)], 512),
        ([trial(256, 120.0), trial(512, 0.0, error="vmem")], 256),
    ],
)
def test_the_cheapest_that_hardly_spills_wins(trials, kv):
    best = winner(trials)
    assert best is not None and best.blocks == {"kv": kv}


def test_without_a_candidate_that_works_there_is_no_winner():
    assert winner([trial(256, 0.0, error="vmem")]) is None
    assert winner([]) is None


def test_the_table_marks_the_winner_and_names_what_was_skipped():
    best = trial(512, 1234.0, 1000, 0.021)
    lines = table([trial(256, 0.0, error="too large"), best], "predicted cycles", best)
    assert lines == ["    kv=256: skipped, too large",
                     "  * kv=512: 1,234 predicted cycles, 1,000 bundles, 2.1% of the hot loop's spill"]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))
def test_every_class_has_candidates_that_differ(operation):
    keys = {json.dumps(dict(key)) for key in operation.classes}
    assert len(keys) == len(operation.classes)
    for key in operation.classes:
        platform = "gpu" if operation in (GPU_DECODE, GPU_PREFILL) else "tpu"
        candidates = [json.dumps(blocks) for blocks in operation.candidates(key, platform)]
        # Of pages of H 256 one fits shared memory.
        assert len(set(candidates)) == len(candidates) >= (1 if operation is GPU_PREFILL else 3)


def test_decode_blocks_are_tried_up_to_what_a_row_can_hold():
    short, long = ({"max_context": size} for size in (1024, 8192))
    assert [blocks["kv"] for blocks in DECODE.candidates(short, "tpu")] == [256, 512, 1024]
    assert [blocks["kv"] for blocks in DECODE.candidates(long, "tpu")] == [256, 512, 1024, 2048]
    assert DECODE.candidates(long, "gpu") == []


def test_classes_are_picked_by_values():
    wanted = dict(tool.wanted(text) for text in ("heads=8 x 128,1 x 64", "kv_dtype=int8", "page_size=16"))
    found = matching(DECODE.classes, wanted)
    assert {(key["heads"], key["max_context"]) for key in found} == {
        (heads, size) for heads in ("8 x 128", "1 x 64") for size in (1024, 8192)
    }
    assert matching(MATMUL.classes, {}) == list(MATMUL.classes)
    for wrong in ({"heads": ("3 x 128",)}, {"head": ("8 x 128",)}):
        with pytest.raises(ValueError, match="8 x 128"):
            matching(DECODE.classes, wrong)


def test_an_entry_replaces_only_its_own(tmp_path):
    path, key = tmp_path / "operation.json", {"rows": 8, "dtype": "int8"}
    others = [Entry("TPU v5 lite", key, {"block": 1}), Entry("TPU v6 lite", {"rows": 8}, {"block": 2})]
    tuning.write(path, [*others, Entry("TPU v6 lite", key, {"block": 3})], {"how": "first"})
    tuning.merge(path, [Entry("TPU v6 lite", key, {"block": 4}, "9 predicted cycles")], {"how": "second"})
    content = json.loads(path.read_text())
    assert content["written"] == {"how": "first"}, "those that say nothing of their own are as they were"
    found = [Entry(**entry) for entry in content["entries"]]
    assert {entry.blocks["block"]: entry.provenance for entry in found} == {1: "", 2: "", 4: "9 predicted cycles"}


def test_a_new_file_says_what_it_was_written_by(tmp_path):
    tuning.merge(tmp_path / "operation.json", [Entry("TPU", {}, {"block": 1})], tool.WRITTEN)
    assert json.loads((tmp_path / "operation.json").read_text())["written"] == tool.WRITTEN


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_a_device_or_a_target_the_tool_says_what_to_do(name, tmp_path):
    if jax.default_backend() != "cpu":
        pytest.skip("a device is here")
    with pytest.raises(SystemExit, match="--target"):
        tool.main(["--operation", name, "--folder", str(tmp_path)])


@pytest.mark.parametrize("shapes", ["page_siz=16", "heads=9x9", "page_size"])
def test_shapes_that_no_class_has_are_named(shapes, tmp_path):
    with pytest.raises(SystemExit, match=f"--shapes.*{shapes.partition('=')[2] or shapes}"):
        tool.main(["--operation", DECODE.name, "--folder", str(tmp_path), "--shapes", shapes])


# What the kernel makes of the file.


def pages(num_kv_heads: int, dtype: str, page_size: int = 16, head_dim: int = 128) -> jax.Array:
    shape = tpu.kv_pages_shape(1, 1, page_size, num_kv_heads, head_dim, dtype)
    return jax.eval_shape(lambda: jnp.zeros(shape, dtype))  # type: ignore[return-value]


@pytest.mark.parametrize("entry", tuning.read(DECODE.name), ids=lambda entry: f"{entry.device} {dict(entry.key)}")
def test_the_kernel_takes_what_was_tuned_for_the_call(entry: Entry):
    num_kv_heads, head_dim = (int(size) for size in str(entry.key["heads"]).split(" x "))
    page_size, max_context = int(entry.key["page_size"]), int(entry.key["max_context"])
    like = pages(num_kv_heads, str(entry.key["kv_dtype"]), page_size, head_dim)
    found = tpu.decode_blocks(like, max_context // page_size, Device("tpu", entry.device))
    assert found == DecodeBlocks(**entry.blocks)
    assert entry.provenance.split()[1] in ("predicted", "measured")


def test_prefill_reads_its_file_for_tiles_and_has_a_rule_for_the_rest(monkeypatch):
    spec = AttentionSpec(32, 8, 128, 16, device=Device("tpu", "TPU v5 lite"))
    rule, wide = prefill_blocks(spec), prefill_blocks(replace(spec, device=V6E))
    assert (rule.rows, wide.rows) == (64, 128), "by the width of the matrix unit"
    assert prefill_blocks(replace(spec, head_dim=256)).rows == 32
    assert capped(rule) == rule and capped(wide) == replace(wide, masked=256), "what a soft cap leaves registers for"
    blocks = default_units(spec.device, 128) | {"rows": 16}
    key = prefill_key(32, 8, 128, "bfloat16", 16)
    monkeypatch.setattr(tuning, "read", lambda name: (Entry(spec.device.kind, key, blocks),) * (name == PREFILL.name))
    assert prefill_blocks(spec) == replace(rule, rows=16)
    assert prefill_blocks(replace(spec, kv_dtype="int8")).rows == 64, "another dtype is a miss"
    assert prefill_blocks(replace(spec, max_q_len=5)).rows == 64, "rows of a few queries are no tiles"


@pytest.mark.parametrize("entry", tuning.read(PREFILL.name), ids=lambda entry: f"{entry.device} {dict(entry.key)}")
def test_prefill_takes_what_was_tuned_for_the_call(entry: Entry):
    num_kv_heads, head_dim = (int(size) for size in str(entry.key["heads"]).split(" x "))
    spec = AttentionSpec(
        num_kv_heads * int(entry.key["group"]), num_kv_heads, head_dim, int(entry.key["page_size"]),
        kv_dtype=str(entry.key["kv_dtype"]), device=Device("tpu", entry.device),
    )  # fmt: skip
    assert asdict(prefill_blocks(spec)).items() >= entry.blocks.items()
    few = prefill_blocks(replace(spec, max_q_len=5))
    assert few.queries == 8, "rows of a few queries are no tiles, tuned or not"
    assert entry.provenance.split()[1] in ("predicted", "measured")


@pytest.mark.parametrize(
    ("num_kv_heads", "dtype", "device"),
    [
        (8, "bfloat16", Device("tpu", "TPU v99")),
        (5, "bfloat16", V6E),
        (8, "float32", V6E),
        (8, "int8", Device("cpu", "cpu")),
    ],
)
def test_a_miss_is_the_kernels_own_rule(num_kv_heads, dtype, device):
    found = tpu.decode_blocks(pages(num_kv_heads, dtype), 64, device)
    assert found == tpu.default_decode_blocks(num_kv_heads, 128, 2, dtype)


H200 = Device("gpu", "NVIDIA H200")


def test_attention_on_a_gpu_takes_what_was_tuned_for_the_call(monkeypatch):
    spec = AttentionSpec(32, 8, 128, 16, max_q_len=1, device=H200)
    rule = gpu_units.choose_blocks(spec, 1, 32)
    blocks = replace(rule, slots=2, split_tokens=1024, max_splits=32)
    tiles = PrefillBlocks(64, 3, 2)
    files = {
        GPU_DECODE.name: (Entry("NVIDIA H200", gpu_blocks.decode_key(spec, 1, 32), asdict(blocks)),),
        GPU_PREFILL.name: (Entry("NVIDIA H200", gpu_blocks.prefill_key(128, "int8", 4, 16), asdict(tiles)),),
    }
    monkeypatch.setattr(tuning, "read", lambda operation: files[operation])
    rows = (np.full(32, 9, np.int32), np.zeros((32, 2048), np.int32), np.arange(33, dtype=np.int32), np.full(3, 32))
    schedule = gpu.make_schedule(*rows, num_tokens=32, spec=spec)
    assert schedule.few is not None and schedule.few.blocks == blocks
    for num_rows in (1, 256):
        most = gpu_units.choose_blocks(spec, 1, num_rows).max_splits
        assert gpu_blocks.decode_blocks(spec, 1, num_rows).max_splits == min(32, most), "partial results are bounded"
    others = (replace(spec, kv_dtype="int8"), replace(spec, head_dim=64), replace(spec, device=Device("gpu", "GB200")))
    for other in others:
        assert gpu_blocks.decode_blocks(other, 1, 32) == gpu_units.choose_blocks(other, 1, 32)
    assert gpu_blocks.decode_blocks(spec, 4, 32) == gpu_units.choose_blocks(spec, 4, 32), "other columns"
    assert gpu_blocks.prefill_blocks(128, "int8", 8, 64, H200, interpret=False) == tiles
    assert gpu_blocks.prefill_blocks(128, "bfloat16", 4, 16, H200, interpret=False) == PrefillBlocks.choose(128)
    assert gpu_blocks.prefill_blocks(128, "int8", 4, 16, H200, interpret=True).num_blocks == 2, "the interpreter's own"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_the_rule_of_prefill_is_among_the_candidates(head_dim: int, kv_dtype: str):
    key = gpu_blocks.prefill_key(head_dim, kv_dtype, 4, 16)
    assert asdict(PrefillBlocks.choose(head_dim, kv_dtype)) in GPU_PREFILL.candidates(key, "gpu")


@pytest.mark.parametrize("operation", [GPU_DECODE, GPU_PREFILL], ids=lambda operation: operation.name)
def test_calls_for_a_gpu_are_traced_with_their_blocks(operation):
    for key in operation.classes[:: len(operation.classes) // 3]:
        call = operation.call(key, operation.candidates(key, "gpu")[0])
        outputs, pages = jax.eval_shape(call.function, *call.arguments)
        assert outputs.shape == call.arguments[0].shape
        assert (pages.shape, pages.dtype) == (call.arguments[3].shape, call.arguments[3].dtype)


def test_for_a_gpu_that_is_not_here_nothing_is_predicted(tmp_path):
    for operation in (GPU_DECODE, MATMUL):
        with pytest.raises(SystemExit, match="no figure ranks blocks"):
            tool.main(["--operation", operation.name, "--target", "h200:1", "--folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


# Timing, on whatever is here.


def test_programs_are_timed_in_turn():
    order = []
    found = timing.interleaved([lambda: order.append(0), lambda: order.append(1)], rounds=3)
    assert order == [0, 1] * 3
    assert len(found) == 2 and min(found) >= 0


def test_a_timed_program_makes_its_calls_one_after_the_other():
    made = []

    def call(new, cache, at):
        jax.debug.callback(lambda total: made.append(float(total)), cache[0])
        return new, cache.at[at].add(new)

    program = timing.ready(Call(call, (np.float32(1), jax.ShapeDtypeStruct((4,), jnp.float32), np.int32(0)), pages=1))
    jax.effects_barrier()
    assert sorted(made) == [1.0 + i for i in range(timing.REPEATS)], "each call sees what the one before wrote"
    program()
    jax.effects_barrier()
    assert len(made) == 2 * timing.REPEATS


# The whole tool, for a device that is not here.


@needs_tpu
def test_the_tool_writes_the_winner_of_compiled_candidates(tmp_path, capsys):
    arguments = ["--operation", DECODE.name, "--target", "v5e:1", "--folder", str(tmp_path), "--shapes",
                 "heads=1 x 128", "kv_dtype=bfloat16", "page_size=128", "max_context=1024"]  # fmt: skip
    assert tool.main(arguments) == 0
    (entry,) = json.loads((tmp_path / f"{DECODE.name}.json").read_text())["entries"]
    assert entry["device"] == "TPU v5 lite" and entry["key"]["heads"] == "1 x 128"
    assert entry["blocks"]["kv"] in (256, 512, 1024)
    assert "predicted cycles" in entry["provenance"]
    printed = capsys.readouterr().out
    assert printed.count("predicted cycles") == 3 and printed.count("  * ") == 1
