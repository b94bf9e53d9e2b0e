"""The training code of the demo checkpoints: the corpus, the batches, the step, and continuing after a stop."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from checkpoints import demo
from checkpoints.demo.train import corpus, export, export_heads, heads, loop, medusa
from checkpoints.demo.train.batches import batch
from checkpoints.demo.train.config import HeadsConfig, ModelConfig, TrainConfig
from checkpoints.demo.train.corpus import Corpus, Module
from checkpoints.demo.train.losses import cross_entropy, distillation, foresight
from checkpoints.demo.train.model import count, forward, hidden_states, init
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


def test_a_head_sees_the_tokens_before_the_one_it_predicts():
    target, shape = init(MICRO, 0), HeadsConfig(heads=3, blocks=1)
    params = heads.init(shape, MICRO.hidden, 1)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, MICRO.hidden)), jnp.float32)

    @jax.jit
    def logits(tokens):
        return jnp.stack(list(heads.predictions(params, target, MICRO, states, tokens, jnp.matmul)))[:, 0]

    tokens = jnp.asarray(STREAM[None, :12])
    changed = logits(tokens.at[0, 5].set((tokens[0, 5] + 1) % 64)) != logits(tokens)
    touched = np.asarray(changed).any(-1)  # [heads, 9]
    expected = [[position < 5 <= position + 1 + head for position in range(9)] for head in range(3)]
    np.testing.assert_array_equal(touched, expected)


def test_foresight_compares_every_head_with_the_target_at_its_own_position():
    target, shape = init(MICRO, 0), HeadsConfig(heads=2, blocks=1)
    params, windows = heads.init(shape, MICRO.hidden, 1), jnp.asarray(batch(STREAM, 0, 0, 2, 16))
    expected = np.asarray(jax.nn.log_softmax(forward(target, windows, MICRO)))
    states = hidden_states(target, windows, MICRO)
    found = [np.asarray(jax.nn.log_softmax(one)) for one in heads.predictions(params, target, MICRO, states, windows)]
    parts = []
    for head, one in enumerate(found):
        for position in range(17 - 2):
            wanted = expected[:, position + 1 + head]  # predicts the token head + 2 behind `position`
            parts.append(np.sum(np.exp(wanted) * (wanted - one[:, position]), -1))
    assert float(jax.jit(foresight(target, MICRO))(params, windows)) == pytest.approx(np.mean(parts), rel=1e-4)


def test_heads_are_trained_written_and_measured(tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_file(str(demo.path("target") / "tokenizer.json"))
    config = MICRO._replace(vocabulary=4096)
    export.write(tmp_path / "target", init(config, 0), config, tokenizer)
    monkeypatch.setattr(medusa, "HEADS", HeadsConfig(heads=2, blocks=1))
    monkeypatch.setattr(medusa, "HEADS_TRAINING", BRIEF._replace(matrix_rate=0.1))
    text = "def add(a, b):\n    return a + b\n" * 40
    modules = Corpus([Module("a.py", text)], [Module("b.py", text[:200]), Module("short.py", "x")])
    medusa.make_heads(tmp_path, tmp_path / "work", modules, 1.0)
    record = json.loads((tmp_path / "medusa/training.json").read_text())
    read = export_heads.read(tmp_path / "medusa")
    assert record["parameters"] == count(read)
    assert record["held_out"]["by_module"].keys() == {"b.py"}
    assert len(record["held_out"]["agreement"]) == 2
    settings = json.loads((tmp_path / "medusa/config.json").read_text())
    assert settings == {**settings, "num_heads": 2, "num_blocks": 1, "hidden_size": 32, "vocab_size": 4096}
    untrained = export_heads.tensors(heads.init(HeadsConfig(2, 1), 32, BRIEF.seed))
    written = export_heads.tensors(read)
    assert untrained.keys() == written.keys()
    assert all(np.any(untrained[name] != written[name]) for name in written)
