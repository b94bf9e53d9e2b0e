"""Reading TPU schedules: recorded dumps of the kernel in kernels.py, and one that is compiled now."""

from pathlib import Path

import pytest

from pallas_kernels.aot import toolchain, tpu_schedule
from pallas_kernels.aot.tpu_schedule import FILL, MATRIX, SPILL, STORE, UnknownFormat

DUMPS = Path(__file__).parent / "dumps"
CHIPS = ("v5e", "v6e", "v5p", "tpu7x")
NAMES = "MXU, XLU, VALU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
CAPACITY = "4 3 4 3 3 1 1 2"


def recorded(chip: str) -> tpu_schedule.Schedule:
    texts = [(DUMPS / f"{chip}.{kind}.txt").read_text() for kind in ("bundles", "utilization")]
    return tpu_schedule.parse("nested", *texts, tpu_schedule.DELAY_SLOTS[chip])


def shape(region: tpu_schedule.Region):
    """The tree without its numbers; a branch that skips nothing but one loop is that loop."""
    inner = tuple(shape(each) for each in region.regions)
    if region.kind == "branch" and region.bundles == 0 and len(inner) == 1:
        return inner[0]
    return (region.kind, *inner)


@pytest.mark.parametrize("chip", CHIPS)
def test_loops_and_branches_of_a_kernel_are_found(chip):
    """The kernel's source: a grid loop, a loop inside it, and in that one `pl.when` and a loop."""
    schedule = recorded(chip)
    (grid,) = schedule.root.loops
    (outer,) = grid.loops
    (inner,) = outer.loops
    assert inner.loops == () and schedule.root.depth == 3
    assert schedule.hot_loop == grid, "most of this kernel's bundles bring blocks in and out"
    rare = outer.regions[0]
    assert (rare.kind, rare.total(STORE)) == ("branch", 1), "what `pl.when` skips comes before the loop"


def test_the_tree_of_a_v5e_dump():
    assert shape(recorded("v5e").root) == (
        "kernel", ("loop", ("branch", ("loop", ("branch",), ("loop",)))))  # fmt: skip
    _, _, inner = [region for region in recorded("v5e").root.walk() if region.kind == "loop"]
    # Read off the dump: from the label 0x47 to the last of the four bundles behind the branch at 0x4a.
    assert (inner.first, inner.last, inner.bundles) == (0x47, 0x4E, 8)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_bundle_and_every_instruction_is_counted_once(chip):
    schedule = recorded(chip)
    assert sum(region.bundles for region in schedule.root.walk()) == len(schedule.utilization)
    for slot in schedule.capacity:
        assert schedule.root.total(slot) == sum(line[slot] for line in schedule.utilization)


def test_the_second_core_of_a_v5p_leaves_at_once():
    first, *_ = recorded("v5p").branches
    assert first.target == len(recorded("v5p").utilization) - 1


def bundles(*bodies: str) -> str:
    return "LB: loop body\n\n" + "\n".join(f"{index:#6x} {body}" for index, body in enumerate(bodies))


def used(*rows: str) -> str:
    return "\n".join(["== CAPACITY:", NAMES, CAPACITY, "== UTILIZATION:", *rows])


LOOP = bundles("  : { %1 = a }", "LB: > { %2 = b } /* Start region 7 :: Start\n region 8 */", "  : > { %3 = c }",
               "  :  { %4 = sbr.rel (!%p1_p0) target = $region7 }", "  : {}", "PF: { %5 = d }")  # fmt: skip
LOOP_USE = (
    "0 0 0 0 0 0 0 1",
    "2 0 4 0 0 1 1 0",
    "4 0 0 3 2 1 0 0",
    "0 0 0 0 0 0 0 1",
    "0 0 0 0 0 0 0 0",
    "1 0 0 0 0 0 0 0",
)


def test_delay_slots_belong_to_the_loop_and_slots_add_up():
    schedule = tpu_schedule.parse("kernel", LOOP, used(*LOOP_USE), delay_slots=1)
    loop = schedule.hot_loop
    assert (loop.first, loop.last) == (1, 4)
    assert schedule.spilling(loop) == 1 / 4
    assert (loop.total(SPILL), loop.total(FILL)) == (1, 2)
    assert schedule.fill(MATRIX, loop) == 6 / 16


def test_a_kernel_without_loops_is_its_own_hot_loop():
    schedule = tpu_schedule.parse("kernel", bundles(" : { %1 = a }"), used("0 0 0 0 0 0 0 1"), delay_slots=4)
    assert schedule.hot_loop == schedule.root and schedule.root.depth == 0


@pytest.mark.parametrize(
    ("text", "utilization", "complaint"),
    [
        (LOOP, used(*LOOP_USE[1:]), "utilisation of 5"),
        (LOOP.replace("0x2", "0x3"), used(*LOOP_USE), "bundle 3 where 2"),
        (LOOP.replace("$region7", "$region9"), used(*LOOP_USE), "region 9, which starts nowhere"),
        (LOOP, used(*LOOP_USE).replace("MXU", "MATRIX"), "not those known"),
        (LOOP, used(*LOOP_USE).replace("2 0 4", "2 4"), "not one number each"),
        (LOOP, "", "no slots"),
    ],
)
def test_an_unknown_format_is_an_error_that_says_where(text, utilization, complaint):
    with pytest.raises(UnknownFormat, match=complaint):
        tpu_schedule.parse("kernel", text, utilization, delay_slots=1)


def test_loops_that_overlap_are_an_error():
    crossing = bundles(" : {} /* Start region 1 */", " : {} /* Start region 2 */",
                       " : { %1 = sbr.rel (%p1_p0) target = $region1 }", " : {}",
                       " : { %2 = sbr.rel (%p1_p0) target = $region2 }", " : {}")  # fmt: skip
    with pytest.raises(UnknownFormat, match="partly outside"):
        tpu_schedule.parse("kernel", crossing, used(*["0 0 0 0 0 0 0 0"] * 6), delay_slots=1)


@pytest.mark.skipif(toolchain.missing("tpu") is not None, reason=str(toolchain.missing("tpu")))
def test_a_dump_written_now_reads_like_the_recorded_one(tmp_path):
    arguments = {"target_name": "v5e:1", "keep": str(tmp_path)}
    toolchain.run("tests.pallas_kernels.aot.kernels:compile_nested", arguments, "tpu", dump=True)
    (now,) = tpu_schedule.collect(tmp_path, "v5e")
    assert now.kernel.startswith("nested")
    assert shape(now.root) == shape(recorded("v5e").root)


@pytest.mark.parametrize(("ended", "last"), [("End region 1", 3), ("End region 8", 2), ("", 2)])
def test_a_tpu7x_branch_has_the_delay_slots_that_what_stands_before_it_needs(ended, last):
    """Behind the branch: a bundle of region 1, which began before it, or the first of what is skipped (region 8)."""
    texts = bundles(" : { %1 = a } /* Start region 1 :: Start region 8 */",
                    " : { %2 = sbr.rel (%p1_p0) target = $region9 }", " : {}", f" : {{ %3 = b }} /* {ended} */",
                    " : { %4 = c } /* Start region 5 */", " : { %5 = d } /* Start/End empty region 9 */")  # fmt: skip
    schedule = tpu_schedule.parse("kernel", texts, used(*["0 0 0 0 0 0 0 0"] * 6), delay_slots=None)
    assert schedule.branches[0].last == last
    assert [(part.first, part.last) for part in schedule.root.regions] == [(last + 1, 4)]
