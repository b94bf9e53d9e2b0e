"""The training code of the demo checkpoints: the corpus, the batches, the step, and continuing after a stop."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.demo.train import corpus, loop
from checkpoints.demo.train.batches import batch
from checkpoints.demo.train.config import ModelConfig, TrainConfig
from checkpoints.demo.train.losses import cross_entropy, distillation
from checkpoints.demo.train.model import forward, init
from checkpoints.demo.train.optimise import State, make_step, optimiser

MICRO = ModelConfig(hidden=32, layers=1, heads=4, kv_heads=2, intermediate=32, head_dim=16, vocabulary=64)
BRIEF = TrainConfig(steps=6, batch=2, seed=3, warmup=1, context=16)
STREAM = np.random.default_rng(0).integers(0, MICRO.vocabulary, 400).astype(np.int32)


@pytest.mark.parametrize(
    "name",
    ["test/test_os.py", "unittest/test/case.py", "idlelib/idle_test/a.py", "site-packages/a.py", "_sysconfigdata_x.py"],
)
def test_corpus_leaves_out_by_name(tmp_path, name):
    for file in (tmp_path / name, tmp_path / "kept.py"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("def kept():\n    return kept\n")
    assert [module.name for module in corpus.modules(tmp_path)] == ["kept.py"]


def test_corpus_leaves_out_tables(tmp_path):
    (tmp_path / "table.py").write_text("table = (\n" + "    0x10,  # a comment\n" * 99 + ")\n")
    (tmp_path / "prose.py").write_text('"""' + "Prose. " * 99 + '"""\n\n\ndef documented():\n    return documented\n')
    assert [module.name for module in corpus.modules(tmp_path)] == ["prose.py"]


def test_corpus_splits_whole_modules_by_name_alone(tmp_path):
    for index in range(100):
        (tmp_path / f"m{index}.py").write_text("pass\n")
    found = corpus.load(tmp_path)
    assert len(found.train) + len(found.held_out) == 100
    assert found.held_out
    assert all(corpus.is_held_out(module.name) for module in found.held_out)


def test_batch_depends_on_seed_and_step_alone():
    first, again, later, other = (batch(STREAM, *key, 2, 16) for key in ((1, 5), (1, 5), (1, 6), (2, 5)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, later)
    assert not np.array_equal(first, other)


def test_an_epoch_visits_every_window_once():
    windows = (len(STREAM) - 1) // 16 - 1
    stream = np.arange(len(STREAM), dtype=np.int32)
    starts = np.concatenate([batch(stream, 1, step, 2, 16)[:, 0] for step in range(windows // 2)])
    assert len(set(starts)) == len(starts)
    assert set(np.diff(np.sort(starts))) <= {16, 32}


def test_a_token_sees_nothing_after_it():
    params = init(MICRO, 0)
    tokens = jnp.asarray(STREAM[None, :100])
    compiled = jax.jit(lambda tokens: forward(params, tokens, MICRO, jnp.matmul))
    full, short = compiled(tokens), compiled(tokens[:, :70])
    np.testing.assert_allclose(full[:, :70], short, atol=1e-5)


def test_distillation_ends_where_the_models_agree():
    params = init(MICRO, 0)
    windows = jnp.asarray(batch(STREAM, 0, 0, 2, 16))
    loss = jax.jit(distillation(MICRO, params, MICRO))
    assert float(loss(params, windows)) == pytest.approx(0.0, abs=1e-6)
    assert float(loss(init(MICRO, 1), windows)) > 1e-3


@pytest.fixture(scope="module")
def step():
    """One compiled step for all the tests that take any."""
    return make_step(cross_entropy(MICRO), optimiser(BRIEF, init(MICRO, 0)))


def test_steps_lower_the_loss(step):
    params = init(MICRO, 0)
    state = State(params, optimiser(BRIEF, params).init(params))
    windows = jnp.asarray(batch(STREAM, 0, 0, 2, 16))
    losses = []
    for _ in range(4):
        state, loss = step(state, windows)
        losses.append(float(loss))
    # The first step of the warm-up has a rate of zero.
    assert losses[0] == losses[1] > losses[2] > losses[3]


def test_an_interrupted_run_continues_bit_by_bit(tmp_path, monkeypatch, step):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "make_step", lambda *_: step)
    loss = cross_entropy(MICRO)
    whole = loop.train(loss, init(MICRO, 0), STREAM, BRIEF, tmp_path)
    shutil.rmtree(tmp_path / str(BRIEF.steps))
    for seed in (1, 2):  # first from one step before the end, then from the end itself
        continued = loop.train(loss, init(MICRO, seed), STREAM, BRIEF, tmp_path)
        jax.tree.map(np.testing.assert_array_equal, whole.params, continued.params)
