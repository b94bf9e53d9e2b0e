"""What the host packs is what the device unpacks, for any plan."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from counting import small_config
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch import Batcher, pack_rules
from jaxinfer.layout import DecodeLayout, PrefillLayout, RulesLayout, SpeculateLayout
from jaxinfer.types import (
    MAX_BAD_WORD_SPELLINGS,
    MAX_BAD_WORD_TOKENS,
    MAX_STOP_IDS,
    RowInit,
    Ruled,
    SamplerForm,
    StepKind,
    StepPlan,
    TokenRules,
)

CONFIG = small_config()
BATCHER = Batcher(CONFIG)

int32s = st.integers(-(2**31), 2**31 - 1)
inits = st.builds(
    RowInit, slot=st.integers(0, 3), temperature=st.floats(0, 2, width=32), top_k=st.integers(0, 300),
    top_p=st.floats(0.125, 1, width=32), min_p=st.floats(0, 1, width=32), seed=st.integers(-(2**63), 2**63 - 1),
    sample_index=st.integers(0, 15), tokens_left=st.integers(1, 90), min_position=st.integers(0, 90),
    stop_ids=st.lists(st.integers(0, 255), max_size=MAX_STOP_IDS).map(tuple))
page_lists = st.lists(st.integers(0, 29), min_size=1, max_size=9).map(tuple)
new_pages = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), page_lists), max_size=4).map(tuple)


@st.composite
def prefill_plans(draw):
    lengths = sorted(draw(st.lists(st.sampled_from([0, 1, 2, 7]), min_size=1, max_size=4)))
    ids = tuple(tuple(draw(st.lists(st.integers(0, 255), min_size=n, max_size=n))) for n in lengths)
    return StepPlan(
        0, StepKind.PREFILL, 1, draw(st.sampled_from(SamplerForm)), tuple(range(len(ids))), ids,
        tuple(draw(st.integers(0, 60)) for _ in ids), tuple(not one or draw(st.booleans()) for one in ids),
        tuple(draw(st.lists(inits, max_size=len(ids)))), draw(new_pages))


@given(prefill_plans())
def test_a_prefill_plan_survives_packing(plan):
    layout, flat, extra = BATCHER.pack(plan)
    assert isinstance(layout, PrefillLayout)
    assert layout.num_tokens >= plan.num_tokens
    fields = layout.unpack(jnp.asarray(flat))
    rows = len(plan.slots)
    counts = [len(ids) or 1 for ids in plan.tokens]
    packed = [token for ids in plan.tokens for token in ids]
    known = slice(plan.num_decode_rows, plan.num_decode_rows + len(packed))
    np.testing.assert_array_equal(fields.tokens[known], packed)
    np.testing.assert_array_equal(fields.slots[:rows], plan.slots)
    np.testing.assert_array_equal(fields.q_lens[:rows], counts)
    np.testing.assert_array_equal(fields.q_lens[rows:], 0)
    decoding = plan.num_decode_rows
    np.testing.assert_array_equal(fields.ends[decoding:rows], np.add(plan.starts, counts)[decoding:])
    np.testing.assert_array_equal(fields.on_device[:rows], [not ids for ids in plan.tokens])
    np.testing.assert_array_equal(fields.samples[:rows], plan.samples)
    np.testing.assert_array_equal(fields.distribution, [counts.count(1), counts.count(1), rows])
    assert int(fields.form) == plan.sampler
    assert (np.asarray(fields.slots[rows:]) > CONFIG.max_num_seqs).all(), "padding rows name no slot"
    check_inits(fields.inits, plan.init_rows)
    check_new_pages(fields.new_pages, extra, plan)


def check_inits(found, wanted):
    assert (np.asarray(found.slot[len(wanted):]) > CONFIG.max_num_seqs).all()
    for index, init in enumerate(wanted):
        for name in ("slot", "tokens_left", "sample_index", "top_k", "min_position"):
            assert int(getattr(found, name)[index]) == getattr(init, name), name
        for name in ("temperature", "top_p", "min_p"):
            assert np.float32(getattr(found, name)[index]) == np.float32(getattr(init, name)), name
        high, low = (int(word) for word in found.seed_words[index])
        assert (high << 32 | low) == init.seed % 2**64
        stops = np.asarray(found.stop_ids[index])
        assert tuple(stops[stops >= 0]) == init.stop_ids


def check_new_pages(carried, extra, plan):
    wanted = [(slot, first + offset, page) for slot, first, ids in plan.new_pages for offset, page in enumerate(ids)]
    inside = [tuple(entry) for entry in np.asarray(carried).tolist() if entry[0] <= CONFIG.max_num_seqs]
    assert inside + [tuple(entry) for entry in extra.tolist()] == wanted


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), st.integers(1, 4), new_pages)
def test_a_decode_plan_survives_packing(slots, rounds, pages):
    count = len(slots)
    plan = StepPlan(0, StepKind.DECODE, rounds, SamplerForm.GREEDY, tuple(slots), ((),) * count, (0,) * count,
                    (True,) * count, (), pages)
    layout, flat, extra = BATCHER.pack(plan)
    assert isinstance(layout, DecodeLayout)
    fields = layout.unpack(jnp.asarray(flat))
    np.testing.assert_array_equal(fields.slots[:count], slots)
    np.testing.assert_array_equal(fields.present, np.arange(layout.num_rows) < count)
    assert int(fields.num_rounds) == rounds
    check_new_pages(fields.new_pages, extra, plan)


def test_each_plan_gets_the_smallest_bucket_that_holds_it():
    def prefill(length, **fields):
        return StepPlan(0, StepKind.PREFILL, 1, SamplerForm.GREEDY, (0,), ((1,) * length,), (0,), (True,), **fields)

    sizes = [BATCHER.layout(prefill(length)).num_tokens for length in (1, 8, 9, 32)]
    assert sizes == [8, 8, 32, 32]
    assert BATCHER.layout(prefill(1, prompt_logprobs=True)).num_tokens == 32


def test_steps_with_proposals_and_plain_ones_have_layouts_of_their_own():
    config = replace(CONFIG, num_speculative_tokens=2)
    slots = tuple(range(config.row_buckets[0]))
    plain = StepPlan(0, StepKind.DECODE, 1, SamplerForm.GREEDY, slots, ((),) * len(slots), (0,) * len(slots),
                     (True,) * len(slots))  # fmt: skip
    drafting = replace(plain, num_drafted=(2,) * len(slots))
    assert isinstance(Batcher(config, plain_alone=True).layout(plain), DecodeLayout)
    assert isinstance(Batcher(config, plain_alone=True).layout(drafting), SpeculateLayout)
    assert isinstance(Batcher(config).layout(plain), SpeculateLayout)


def test_all_bad_words_that_a_request_may_have_reach_the_device():
    words = tuple((2, *range(3, 3 + index % (MAX_BAD_WORD_TOKENS - 1)), index)
                  for index in range(MAX_BAD_WORD_SPELLINGS))
    flat = pack_rules(1, Ruled(TokenRules(bad_words=words), (1,), ()), 1024)
    slot, row = RulesLayout(1024).unpack(jnp.asarray(flat))
    assert int(slot) == 1
    assert [tuple(id for id in word if id >= 0) for word in np.asarray(row.bad_words).tolist()] == list(words)
