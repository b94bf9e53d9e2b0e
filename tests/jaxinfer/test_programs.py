"""Facts about the compiled programs that speed and memory depend on, read from the programs themselves."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.batch import Batcher
from jaxinfer.config import EngineConfig, ModelConfig, RopeConfig
from jaxinfer.draft_model import DraftModel
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.executor import Executor
from jaxinfer.memory import measure_temporaries
from jaxinfer.models import make_decoder
from jaxinfer.params import init_params
from jaxinfer.programs import SAMPLE_LEGAL, declare, largest
from jaxinfer.prompt_lookup import PromptLookup
from jaxinfer.types import SamplerForm

CONFIG = ModelConfig(
    family="llama", vocab_size=128, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5, rope=RopeConfig(), windows=(0, 0, 0))
ENGINE = EngineConfig(max_model_len=256, num_pages=4096, page_size=16, max_num_seqs=8, max_num_batched_tokens=64,
                      token_buckets=(64,), row_buckets=(8,))


@pytest.fixture(scope="module")
def executor():
    model = make_decoder(CONFIG, dtype=jnp.float32, page_size=16)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return Executor(model, init_params(CONFIG, dtype=jnp.float32), ENGINE, place)


@pytest.fixture(scope="module")
def compiled(executor):
    programs = declare(executor.signature)
    return {key: program.compile() for key, program in programs.items() if key[0] in ("prefill", "decode")}


def test_pages_and_row_state_are_written_in_place(executor, compiled):
    """Donated bytes are aliased, and temporaries stay far below one copy of the pages (as DESIGN section 1 wants)."""
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(executor.signature.state))
    pages = executor.signature.state.kv_pages.nbytes
    for key, program in compiled.items():
        analysis = program.memory_analysis()
        assert analysis.alias_size_in_bytes >= state, key
        assert analysis.temp_size_in_bytes < pages / 8, key


def test_no_weight_is_copied(executor, compiled):
    """Weights are the arguments of matmuls as they lie in memory: no copy or transpose of a whole projection."""
    for key, program in compiled.items():
        for line in program.as_text().splitlines():
            copied = " copy(" in line or " transpose(" in line
            assert not (copied and "f32[32,64]" in line.split("=")[-1].split("(")[0]), (key, line)


def test_few_programs_are_declared(executor):
    """The default buckets of a server, without a model: at most 24 programs. Grammars need one more."""
    signature = executor.signature
    declared = declare(signature)
    assert len(declared) == 1 + 3 + 5
    server = EngineConfig(max_model_len=32_768, num_pages=10_000, max_num_seqs=256, max_num_batched_tokens=8192)
    assert len(server.token_buckets) + 3 * len(server.row_buckets) + 5 <= 24
    with_grammars = replace(signature, batcher=Batcher(replace(ENGINE, grammars=True)))
    assert declare(with_grammars).keys() - declared.keys() == {SAMPLE_LEGAL}


@pytest.mark.parametrize(("kind", "forms"), [("draft_model", tuple(SamplerForm)), ("ngram", (SamplerForm.GREEDY,))])
def test_draft_verify_accept_and_sample_are_one_program(kind, forms):
    """Also pages and the drafter's state are written in place, and nothing goes to the host in between."""
    model = make_decoder(CONFIG, dtype=jnp.float32, page_size=16)
    params = init_params(CONFIG, dtype=jnp.float32)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    config = replace(ENGINE, num_speculative_tokens=3)
    # A history that would be seen if it were copied.
    drafter, own = ((DraftModel(model, 3), params) if kind == "draft_model" else
                    (PromptLookup(3, config.max_num_seqs, 2**20), ()))  # fmt: skip
    executor = Executor(DraftPair(model, drafter), Pair(params, own), config, place)
    programs = {key: program for key, program in declare(executor.signature).items()
                if key[0] == "speculate" and key[2] in forms}  # fmt: skip
    assert len(programs) == len(forms)
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(executor.signature.state))
    pages = executor.signature.state.kv_pages.target.nbytes
    for program in programs.values():
        compiled = program.compile()
        analysis, text = compiled.memory_analysis(), compiled.as_text()
        assert analysis.alias_size_in_bytes >= state
        assert analysis.temp_size_in_bytes < pages / 8
        assert not re.search(r"\b(infeed|outfeed|send|recv|host)\b|callback", text)


def test_steps_without_proposals_leave_a_draft_model_out():
    """Its parameters and pages are no arguments of theirs; other drafters see every round."""
    model = make_decoder(CONFIG, dtype=jnp.float32, page_size=16)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params, config = init_params(CONFIG, dtype=jnp.float32), replace(ENGINE, num_speculative_tokens=3)
    both = Executor(DraftPair(model, DraftModel(model, 3)), Pair(params, params), config, place)
    alone = Executor(model, params, ENGINE, place)
    plain = [key for key in declare(both.signature) if key[0] == "decode"]
    assert plain == [key for key in declare(alone.signature) if key[0] == "decode"]
    for key in plain:
        shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), declare(executor.signature)[key].arguments)
                  for executor in (both, alone)]  # fmt: skip
        assert shapes[0] == shapes[1]
    lookup = Executor(DraftPair(model, PromptLookup(3, config.max_num_seqs, 256)), Pair(params, ()), config, place)
    assert not any(key[0] == "decode" for key in declare(lookup.signature))


WIDE = replace(CONFIG, vocab_size=20_000, num_layers=1, windows=(0,))
"""With a vocabulary that matters."""


def needed_by(declared) -> dict:
    """Bytes of each program, with what it is handed."""
    return {key: measure_temporaries(lambda program=program: [(program.compile(), program.handed)])
            for key, program in declared.items()}


def test_the_memory_plan_measures_the_programs_with_the_most_temporaries():
    """No program of the engine takes more than those that are measured."""
    model = make_decoder(WIDE, dtype=jnp.float32, page_size=16)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    declared = declare(Executor(model, init_params(WIDE, dtype=jnp.float32), ENGINE, place).signature)
    needed = needed_by(declared)
    assert max(needed.values()) == max(needed[key] for key in largest(declared))
    assert needed["decode", 8, SamplerForm.FULL] > needed["decode", 8, SamplerForm.GREEDY]


def test_verification_under_masks_is_measured_with_the_proposals_that_it_is_handed():
    """Those of a draft model come with logits f32[R, X, V]."""
    model, params = make_decoder(WIDE, dtype=jnp.float32, page_size=16), init_params(WIDE, dtype=jnp.float32)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    config = replace(ENGINE, num_speculative_tokens=3, grammars=True)
    pair = DraftPair(model, DraftModel(model, 3))
    declared = declare(Executor(pair, Pair(params, params), config, place).signature)
    halves = {key: program for key, program in declared.items() if key[0] in ("propose", "verify")}
    assert set(halves) & set(largest(declared)) == {("verify", 8)}
    needed, logits = needed_by(halves), 4 * 8 * 3 * WIDE.vocab_size
    assert needed["verify", 8] > halves["verify", 8].handed >= logits
    assert needed["verify", 8] > needed["propose", 8] >= logits
