"""Heads as the drafter: every answer is what it is without them, their state is that of the right position, their
proposals are those of a NumPy reference, and heads that do not fit are refused.

Counting heads first: they are right only where both the hidden state and the token before are what they must be.
"""

import json
import shutil
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import VOCAB, new_engine, request, small_config
from counting_mixes import arrivals, check_mix, ids_of, run
from hypothesis import given, settings
from lazy_programs import warm_up_lazily
from safetensors.numpy import load_file, save_file
from test_speculation import Fickle

from jaxinfer import loading, row_state, sharding
from jaxinfer.config import EngineConfig
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.drafter import Wanted
from jaxinfer.drafting import check_drafter, load_heads
from jaxinfer.errors import InvalidConfig, ModelFormatError
from jaxinfer.executor import Executor
from jaxinfer.medusa_drafter import MedusaDrafter
from jaxinfer.models import make_decoder
from jaxinfer.start_options import Options
from jaxinfer.testing import CountingModel
from jaxinfer.types import SamplerForm

DRAFTED, FIRST_WRONG = 3, 128


@dataclass(frozen=True)
class CountingHeads:
    """A state's logits are those of the number after it. Wrong behind some of the tokens from FIRST_WRONG on."""

    def advance(self, params, index, state, tokens):
        fits = tokens == (state[:, 0].astype(jnp.int32) + 1) % VOCAB
        wrong = (tokens >= FIRST_WRONG) & (tokens % 3 == 1)
        return jnp.where(fits & ~wrong, tokens, tokens + 7)[:, None].astype(jnp.float32)


@pytest.fixture(scope="module")
def counting() -> Executor:
    config = small_config(num_speculative_tokens=DRAFTED)
    target, place = CountingModel(VOCAB), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    pair = DraftPair(target, MedusaDrafter(target, CountingHeads(), DRAFTED, config.max_num_seqs, 1, jnp.float32))
    executor = Executor(pair, Pair(jax.device_put(jnp.float32(0), place), ()), config, place)
    executor.warm_up(workers=2, progress=lambda name: None)
    return executor


@settings(max_examples=60)
@given(mix=arrivals())
def test_any_mix_gives_each_request_its_own_answer(counting, mix):
    """Stop ids, minimum lengths, log-probabilities, priorities, cancels, preemption and prefix hits among them."""
    check_mix(new_engine(counting, drafts=Fickle(DRAFTED)), mix)


@pytest.mark.parametrize("drafts", [None, Fickle(DRAFTED)], ids=["all", "fickle"])
@pytest.mark.parametrize("seed", [None, 11])
def test_the_state_is_that_of_the_last_computed_position(seed, drafts, counting):
    """Right heads are kept whole: behind chunked prompts, prefix hits, mixed steps, rounds with and without proposals,
    and in slots that other rows had before.
    """
    engine = new_engine(counting, drafts=drafts)
    for index, length in enumerate([1, 40, 40, 9, 45, 17]):
        engine.add(request(str(index), range(length), 33, temperature=index % 2, arrival=float(index), given=seed))
    chunks = run(engine)
    for index, length in enumerate((1, 40, 40, 9, 45, 17)):
        assert ids_of(chunks[str(index), 0]) == [(length + offset) % VOCAB for offset in range(33)]
    metrics = engine.scheduler.metrics
    assert metrics.accepted_tokens == metrics.draft_tokens > 50


# Real heads: the shipped ones.


@pytest.fixture(scope="module")
def loaded():
    return loading.load_model("demo", dtype=jnp.float32)


def heads_of(loaded, mesh=None, **options):
    """The shipped heads as a start loads them: drafter and parameters."""
    target = make_decoder(loaded.config, dtype=jnp.float32, page_size=16, mesh=mesh)
    chosen = Options(model="demo", speculation="medusa", max_num_seqs=4, **options)
    return load_heads(chosen, target, loaded.params, lambda line: None)


def real_executor(loaded, heads: bool) -> Executor:
    config = EngineConfig(
        max_model_len=64, num_pages=20, page_size=16, max_num_seqs=4, max_num_batched_tokens=32, max_decode_rounds=4,
        num_speculative_tokens=4 if heads else 0, token_buckets=(32,), row_buckets=(4,))  # fmt: skip
    model, params = make_decoder(loaded.config, dtype=jnp.float32, page_size=16), loaded.params
    if heads:
        drafter, own = heads_of(loaded)
        model, params = DraftPair(model, drafter), Pair(params, own)
    executor = Executor(model, params, config, sharding.sharding(None, jax.sharding.PartitionSpec()))
    warm_up_lazily(executor)
    return executor


def answers(executor: Executor) -> dict[str, list[int]]:
    """Answers to greedy requests and to those with a seed, together. Greedy ones end first: one sampler is compiled."""
    engine = new_engine(executor)
    for index in range(6):
        prompt = [3 + (7 * index + 5 * i) % 250 for i in range(4 + index)]
        temperature, top_k, count = (0.0, 0, 15) if index % 3 == 0 else (0.7, 40 * (index % 2), 30)
        engine.add(request(str(index), prompt, count, given=index, temperature=temperature, top_k=top_k,
                           arrival=float(index)))  # fmt: skip
    chunks = run(engine)
    metrics = engine.scheduler.metrics
    assert metrics.draft_tokens == 0 or 0 < metrics.accepted_tokens < metrics.draft_tokens
    return {str(index): ids_of(chunks[str(index), 0]) for index in range(6)}


def test_seeded_and_greedy_output_is_that_without_speculation(loaded):
    assert answers(real_executor(loaded, heads=True)) == answers(real_executor(loaded, heads=False))


def reference(hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Logits [R, k, V] after hidden states [R, D] and tokens [R, k], by the files' own names and in float64."""
    target, heads = (
        {name: array.astype(np.float64) for name, array in load_file(loading.model_folder(name) / "model.safetensors")
         .items()} for name in ("demo", "demo-medusa"))  # fmt: skip
    embed = target["model.embed_tokens.weight"]

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * weight

    def block(x, name):
        y = x @ heads[name + "weight"].T + heads[name + "bias"]
        return x + y / (1 + np.exp(-y))

    x, found = hidden.astype(np.float64), []
    for index in range(tokens.shape[1]):
        name = f"heads.{index}."
        parts = norm(x, heads[name + "state_norm.weight"]), norm(embed[tokens[:, index]], heads[name +
                                                                 "token_norm.weight"])  # fmt: skip
        x = np.concatenate(parts, -1) @ heads[name + "input.weight"].T
        for number in range(2):
            x = block(x, f"{name}blocks.{number}.")
        found.append(norm(x, target["model.norm.weight"]) @ embed.T)
    return np.stack(found, 1)


@pytest.mark.parametrize(
    ("form", "shards"), [(SamplerForm.GREEDY, 1), (SamplerForm.SIMPLE, 1), (SamplerForm.SIMPLE, 2)])  # fmt: skip
def test_proposals_are_those_of_the_reference(form, shards):
    """Each token by the distribution that is handed on, and each distribution behind the tokens before it."""
    mesh = sharding.make_mesh(shards) if shards > 1 else None
    loaded = loading.load_model("demo", dtype=jnp.float32, mesh=mesh)
    drafter, own = heads_of(loaded, mesh)
    random, place = np.random.default_rng(0), sharding.sharding(mesh, jax.sharding.PartitionSpec())
    slots, last = np.array([2, 0, 3]), np.array([11, 500, 7], np.int32)
    hidden = (3 * random.standard_normal((5, 256))).astype(np.float32)
    rows = row_state.empty(4, 4, 4096, place)
    keys = jnp.asarray(random.integers(0, 2**32, (5, 2)), jnp.uint32)
    sampled = rows.sampling._replace(key=keys, temperature=jnp.full(5, 1.0), top_p=jnp.full(5, 1.0))
    rows = replace(rows, last_token=jnp.zeros(5, jnp.int32).at[slots].set(last), sampling=sampled)
    wanted = Wanted(jnp.asarray(slots), jnp.ones(3, bool), jnp.array([4, 1, 4]), rows.page_table[slots],
                    row_state.sampling_of(rows, jnp.asarray(slots)))  # fmt: skip
    state, rows, wanted = jax.device_put((hidden, rows, wanted), place)
    drafted, _ = jax.jit(drafter.propose, static_argnums=0)(form, Pair(loaded.params, own), state, rows, wanted)
    tokens = np.asarray(drafted.tokens)
    expected = reference(hidden[slots], np.concatenate([last[:, None], tokens[:, :3]], 1))
    if form is SamplerForm.GREEDY:
        assert drafted.logits is None
        np.testing.assert_array_equal(tokens, expected.argmax(-1))
    else:
        np.testing.assert_allclose(drafted.logits, expected, atol=2e-3)
        assert not np.array_equal(tokens, expected.argmax(-1))


# Heads that do not fit.


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(loading.model_folder("demo-medusa"), tmp_path / "heads")


def change(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"hidden_size": 128}, InvalidConfig, "heads for 128 hidden states, demo has 256"),
    ({"vocab_size": 5000}, InvalidConfig, "heads for 5000 tokens, demo has 4096"),
    ({"num_heads": 2}, InvalidConfig, "at most 2, the number of heads"),
    ({"model_type": "llama"}, ModelFormatError, "model_type must be 'sequential_medusa', got 'llama'"),
    ({"num_blocks": 0}, ModelFormatError, "num_blocks must be an integer of 1 to"),
    ({"target_final_norm_sha256": 3}, ModelFormatError, "target_final_norm_sha256 must be a string, got 3"),
])  # fmt: skip
def test_heads_that_do_not_fit_are_refused_before_anything_is_loaded(folder, changes, error, message):
    change(folder, **changes)
    options = Options(model="demo", speculation="medusa", draft_model=str(folder))
    options.validate()
    with pytest.raises(error, match=message):
        check_drafter(options, loading.model_folder("demo"), 512, jnp.float32, None)


def test_heads_of_another_target_are_refused(loaded, folder):
    change(folder, target_final_norm_sha256="0" * 64)
    with pytest.raises(InvalidConfig, match=r"final norm has SHA-256 0000000000000000\.\.\., that of demo is"):
        heads_of(loaded, draft_model=str(folder))


def test_defects_of_the_file_are_named(loaded, folder):
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("heads.3.input.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"1 tensors are missing: heads\.3\.input\.weight"):
        heads_of(loaded, draft_model=str(folder))
    save_file(weights | {"heads.3.input.weight": np.ascontiguousarray(lost.T)}, folder / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"heads\.3\.input\.weight: expected shape \(256, 512\), found"):
        heads_of(loaded, draft_model=str(folder))


def test_another_model_has_to_name_its_heads():
    with pytest.raises(InvalidConfig, match="'medusa' needs draft_model, a folder with heads for models/mine"):
        Options(model="models/mine", speculation="medusa").validate()
    Options(model="models/mine", speculation="medusa", draft_model="heads").validate()
    Options(model="demo", speculation="medusa").validate()
