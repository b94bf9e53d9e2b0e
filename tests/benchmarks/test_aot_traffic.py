"""The HLO reader of `make aot` and its counts, on small programs whose bytes can be done in the head."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot import hlo, traffic
from benchmarks.aot.partials import Partials
from pallas_kernels.ragged_paged_attention import AttentionSpec

# A loop over 4 layers of weights bf16[128,256] (65,536 B each). A fusion multiplies by the layer's slice, another one
# writes a row of 512 B into the cache in place; the embedding is gathered from; the weight of the head is fetched into
# VMEM ahead and used from there.
LOOP = Path(__file__).with_name("loop.hlo").read_text()


def bytes_by_name(module, **options) -> dict[str, int]:
    return {item.name: item.total for item in traffic.count(module, **options) if item.total > 512}


def test_only_what_is_sliced_updated_or_gathered_counts_and_a_loop_as_often_as_it_runs():
    assert bytes_by_name(hlo.parse(LOOP)) == {
        "y": 4 * (65_536 + 4),  # the index, and a layer's slice through two fusions, 4 times; activations lie in VMEM
        "ahead": 128 * 512 * 2,  # fetched once, and not counted again where it is used
        "kv.1": 4 * (8 * 256 * 2 + 4),  # the rows that are written, not the cache
        "x.0": 8 * 128 * 2,
    }


def test_a_use_of_the_whole_stack_counts_whole():
    whole = LOOP.replace("dynamic-slice(%p.0, %p.1, %c.0, %c.0)", "reduce(%p.0, %c.0)")
    assert bytes_by_name(hlo.parse(whole))["y"] == 4 * 4 * 65_536


def test_a_loop_of_unknown_length_counts_once():
    unknown = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
    assert bytes_by_name(unknown)["y"] == 65_536 + 4
    noted = LOOP.replace("direction=LT", "direction=NE").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert bytes_by_name(hlo.parse(noted))["y"] == 7 * (65_536 + 4)


def test_collectives_count_as_often_as_they_run():
    assert traffic.collectives(hlo.parse(LOOP)) == {"all-reduce": 4}


PROTECTED = {traffic.signature("bf16", (4, 128, 256)), traffic.signature("bf16", (128, 256))}


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("%zero =", "%twin = bf16[4,128,256]{2,1,0:T(16,128)(2,1)} copy(%e.2)\n  %zero =", ["twin"]),
        ("%zero =", "%twin = bf16[4,128,256]{1,2,0:T(8,128)(2,1)} transpose(%e.2)\n  %zero =", ["twin"]),
        ("%zero =", "%near = bf16[4,128,256]{2,1,0:T(8,128)(2,1)S(1)} copy(%e.2)\n  %zero =", []),  # into VMEM
        ("%y = ", "%one = bf16[128,256]{1,0:T(8,128)} fusion(%w, %i), kind=kLoop, calls=%slice_of\n  %y = ", ["one"]),
        ("%zero =", "%other = bf16[64,256]{1,0:T(8,128)(2,1)} copy(%e.3)\n  %zero =", []),
    ],
)  # fmt: skip
def test_copies_of_weights_are_found(old, new, found):
    assert traffic.copies(hlo.parse(LOOP), PROTECTED) == []
    assert traffic.copies(hlo.parse(LOOP.replace(old, new, 1)), PROTECTED) == found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("%turned = bf16[256,128]{1,0:T(8,128)(2,1)} copy(%e.2)", []),
        ("%turned = bf16[256,128]{1,0:T(8,128)(2,1)} transpose(%e.2), dimensions={1,0}", ["turned"]),
        ("%own = bf16[128,256]{0,1:T(8,128)(2,1)} copy(%e.2)", ["own"]),
    ],
)
def test_the_residual_stream_may_be_copied_as_it_is_and_a_weight_not_even_turned(line, found):
    module = hlo.parse(LOOP.replace("%zero =", f"{line}\n  %zero =", 1))
    assert traffic.copies(module, {("bf16", (128, 256))}, stream=(256, 128)) == found



def test_kernels_count_by_the_callers_formula():
    call = '%call = bf16[64,256]{1,0:T(8,128)(2,1)} custom-call(%e.3), custom_call_target="kernel"\n  %zero ='
    module = hlo.parse(LOOP.replace("%zero =", call, 1))
    assert bytes_by_name(module)["call"] == 2 * 64 * 256 * 2
    assert bytes_by_name(module, kernel_bytes=lambda call, _: 1234)["call"] == 1234


def test_of_partial_results_those_in_use_count():
    spec = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16, max_q_len=1)
    assert Partials.of(spec, num_rows=32, context=2048, longest=4000).room == 32 * 8 * 8
    partials = Partials.of(spec, num_rows=32, context=2048, longest=1 << 20)
    assert partials == Partials(room=32 * 8 * 32, used=32 * 8 * 4)  # splits of 512 tokens, room for 32
    sums, scores, other = hlo.arrays("(f32[8192,128,8]{2,1,0}, f32[8192,2,8]{2,1,0}, bf16[8192,128,8]{2,1,0})")
    assert [partials.holds(array) for array in (sums, scores, other)] == [True, True, False]
    assert partials.num_bytes(sums) == 1024 * 128 * 8 * 4
    assert Partials.of(spec, num_rows=32, context=512, longest=512).used == 0


@pytest.mark.parametrize(
    ("text", "num_bytes", "in_hbm"),
    [
        ("f32[14336,1]{1,0:T(8,128)}", 14_336 * 128 * 4, True),  # one lane of 128 is used
        ("f32[14336,1]{0,1:T(1,128)}", 14_336 * 4, True),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 8 * 128 * 2, True),
        ("s8[2,3]", 6, True),
        ("pred[]", 1, True),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 4096, False),
        ("s4[16]", 8, True),
    ],
)
def test_bytes_of_an_array_with_its_padding(text, num_bytes, in_hbm):
    (array,) = hlo.arrays(text)
    assert (array.num_bytes, array.hbm_bytes) == (num_bytes, num_bytes if in_hbm else 0)


def test_a_program_of_this_machines_compiler_is_read_whole():
    weights = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((4, 64), jnp.float32)

    def step(weights, x):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    text = jax.jit(step).lower(weights, x).compile().as_text()
    module = hlo.parse(text or "")
    assert sum(len(each.instructions) for each in module.computations.values()) == (text or "").count(" = ")
    loops = [each for each in module.computations[module.entry].instructions.values() if each.opcode == "while"]
    assert [traffic.trip_count(loop, module) for loop in loops] == [6]
    assert sum(item.total for item in traffic.count(module)) >= 6 * 64 * 64 * 4


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")
