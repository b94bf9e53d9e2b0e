"""bench_tpu_static without libtpu: it says that it was skipped; and its arithmetic on counts made up here."""

import json
import math

import pytest

from benchmarks import bench_tpu_static as bench
from benchmarks.tpu_static import matmuls, programs
from benchmarks.tpu_static.measure import Group
from benchmarks.tpu_static.shapes import AttentionShape, Count, MatmulShape
from pallas_kernels.aot import toolchain, tpu_execution, tpu_schedule
from pallas_kernels.aot.counting import Executed
from pallas_kernels.aot.targets import target
from tests.pallas_kernels.aot.test_tpu_schedule import bundles, used

CHIP = target("v6e:1").chip


def count(bundles: int, bytes_moved: int = 0, spilling: float = 0.0, fill: float = 0.5) -> Count:
    return Count(bundles, 0, bytes_moved, 1, 1, spilling, 0, fill, fill)


def comparison(page_size: int = 16, ours: int = 1000, peer: int | None = 4000, **fields) -> bench.Comparison:
    shape = AttentionShape(32, 1, 1024, page_size)
    return bench.Comparison(shape, CHIP, count(ours, **fields), count(peer) if peer else None, (512, 2))


def test_without_libtpu_every_value_is_null_and_nothing_fails(monkeypatch, capsys):
    monkeypatch.setattr(toolchain, "missing", lambda platform: f"no compiler for {platform}")
    assert bench.main([]) == 0
    skipped, *_, last = capsys.readouterr().out.strip().splitlines()
    assert skipped == "skipped: no compiler for tpu"
    assert {result["value"] for result in json.loads(last)["results"]} == {None}


def test_bytes_and_products_of_a_shape():
    shape = AttentionShape(rows=2, q_len=3, context=5, num_q_heads=4, num_kv_heads=2, head_dim=8)
    assert shape.kv_bytes == 2 * 5 * 2 * 2 * 8 * 2
    # Queries and outputs, and the new rows read and written once more.
    assert shape.ideal_bytes == shape.kv_bytes + 2 * 6 * 4 * 8 * 2 + 2 * 6 * 2 * 2 * 8 * 2
    # The three queries see 3, 4 and 5 tokens; two products of 8 multiplications and additions a head and pair.
    assert shape.flops == 2 * (3 + 4 + 5) * 4 * (2 * 2 * 8)


def test_share_of_bandwidth_is_bound_by_the_longer_of_bundles_and_bytes():
    ideal = AttentionShape(32, 1, 1024).ideal_bytes
    cycles = ideal / CHIP.hbm_bytes_per_cycle
    assert comparison(ours=1, bytes_moved=2 * ideal).share_of_bandwidth == pytest.approx(0.5)
    assert comparison(ours=int(4 * cycles), bytes_moved=ideal).share_of_bandwidth == pytest.approx(0.25, rel=1e-3)
    assert comparison(ours=1, bytes_moved=ideal // 2).share_of_bandwidth == 1, "the other core moves the other half"


def test_results_are_the_worst_of_the_shapes():
    found = [comparison(16, 1300), comparison(128, 1000, spilling=0.2), comparison(16, 900, None)]
    ratio, small, _, spilling = bench.decode_results("v6e:1", "bfloat16", found[:2])
    assert (ratio.value, small.value, spilling.value) == (1300 / 4000, 1.3, 0.2)
    assert bench.worst_ratio(found[2:]) is None, "nothing to compare with"


def test_when_ours_serves_nothing_every_floor_is_missed():
    for results in (bench.decode_results("v6e:1", "int8", []), bench.prefill_results("v6e:1", [])):
        assert all(math.isnan(result.value) and not result.reaches(result.floor) for result in results)


def test_whole_prompts_and_pieces_are_held_to_the_floor_apart():
    found = [
        bench.Comparison(AttentionShape(1, 512, context, 16), CHIP, count(1000), count(peer), (512, 2))
        for context, peer in ((512, 2000), (4096, 1000))
    ]
    whole, pieces, *_ = bench.prefill_results("v6e:1", found)
    assert (whole.value, pieces.value) == (0.5, 1.0)
    assert whole.reaches(whole.floor) and not pieces.reaches(pieces.floor)


def test_the_peer_is_taken_at_its_best_block_and_ours_must_compile():
    shape = AttentionShape(32, 1, 1024)
    group = Group("v6e:1", shape.title, tuple(bench.contenders("v6e:1", shape)))
    moved = shape.ideal_bytes
    found = [count(500_000, moved), "does not fit", *(count(900_000 - i) for i in range(len(group.programs) - 2))]
    best = bench.compare(shape, group, found)
    assert best is not None and best.peer == found[-1] and best.ratio == 500_000 / found[-1].bundles
    assert best.blocks == (group.programs[-1]["pages"] * 16, group.programs[-1]["queries"])
    with pytest.raises(RuntimeError, match="does not compile: VMEM"):
        bench.compare(shape, group, ["VMEM", *found[1:]])
    with pytest.raises(RuntimeError, match="less than its products"):
        bench.compare(shape, group, [count(500), *found[1:]])
    with pytest.raises(RuntimeError, match="a copy was not counted"):
        bench.compare(shape, group, [count(500_000, moved * 3 // 4), *found[1:]])
    assert bench.compare(shape, group, ["Unsupported: H", *found[1:]]) is None


def test_only_targets_with_floors_have_marks():
    found = [comparison(16), comparison(128)]
    marked, shown = (bench.attention_results(name, found) for name in ("v6e:1", "v5p:1"))
    assert [result.name.partition(" ")[2] for result in marked] == [result.name.partition(" ")[2] for result in shown]
    assert all(result.floor is not None for result in marked) and all(result.floor is None for result in shown)


def layer(rows: int, ours: Count, xla: Count) -> list[matmuls.MatmulComparison]:
    """All matmuls with the same counts."""
    return [matmuls.MatmulComparison(MatmulShape(rows, *size), CHIP, ours, xla, n) for size, n in matmuls.LAYER.items()]


def test_many_rows_are_held_to_matrix_slots_and_few_to_bandwidth():
    names = {}
    for rows in (64, 512):
        found = matmuls.results("v6e:1", layer(rows, count(10_000), count(20_000)))
        names[rows] = [result.name for result in found if result.floor is not None]
        assert found[-1].value == 0.5
    assert names == {64: ["v6e:1 int8 matmul, 64 rows, predicted share of bandwidth"],
                     512: ["v6e:1 int8 matmul, 512 rows, predicted matrix slots in use in a step"]}  # fmt: skip


def test_a_matmul_has_no_more_than_the_whole_bandwidth_and_a_layer_is_the_mean_over_its_bundles():
    """What XLA brought into VMEM before is no gain."""
    (few, *_) = matmuls.results("v6e:1", layer(8, count(10), count(10)))
    assert few.value == pytest.approx(1)
    big, *others = layer(512, count(3000, fill=0.9), count(1000))
    small = [matmuls.MatmulComparison(each.shape, CHIP, count(0, fill=0.1), each.xla, each.times) for each in others]
    assert matmuls.results("v6e:1", [big, *small])[0].value == pytest.approx(0.9)


def test_comparisons_of_a_weight_pair_ours_with_xlas():
    for group in matmuls.groups("v5e:1", quick=False):
        found = [count(1000 + i) for i, _ in enumerate(group.programs)]
        pairs = matmuls.comparisons(group, found)
        assert [each.shape.rows for each in pairs] == [8, 64, 512]
        assert all(each.ours.bundles + 1 == each.xla.bundles for each in pairs)
        with pytest.raises(RuntimeError, match="does not compile: VMEM"):
            matmuls.comparisons(group, ["VMEM", *found[1:]])


def test_matrix_slots_in_a_step_and_all_in_all():
    """Three passes through a loop of three bundles, which hold 4, 2 and 0 of 4 slots."""
    texts = bundles(" : { %s1_s1 = smov 0 }", "LB: > { %s2_s1 = sadd.s32 1, %s1_s1 } /* Start region 1 */",
                    " : { %p1_p0 = scmp.lt.s32.totalorder %s2_s1, 3 }",
                    " : { %2 = sbr.rel (%p1_p0) target = $region1 }", " : {}")  # fmt: skip
    slots = used(*(f"{matrix} 0 0 0 0 0 0 0" for matrix in (0, 4, 2, 0, 0)))
    schedule = tpu_schedule.parse("kernel", texts, slots, delay_slots=0)
    execution = tpu_execution.execute(schedule, {})
    assert programs.step_fill(schedule, execution) == pytest.approx((4 + 2) / (3 * 4))
    executed = Executed(is_kernel=True, schedule=schedule, execution=execution)
    assert programs.whole_fill([executed, executed]) == pytest.approx(3 * (4 + 2) / ((3 * 3 + 2) * 4))
