"""int8 and fp8 pages in the model: ranges, scales, where they lie, and how near the answers stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_model import PAGE_SIZE, PagedModel, tiny_config

from jaxinfer import kv_scales, sharding
from jaxinfer.kv_scales import KVRanges
from jaxinfer.loading import load_model, random_params
from jaxinfer.model import Rows
from jaxinfer.models import make_decoder
from jaxinfer.params import abstract_params, partition_specs
from jaxinfer.tokenizer import Tokenizer
from pallas_kernels import ragged_paged_attention as attention
from pallas_kernels.dispatch import Unsupported

FP8 = jnp.float8_e4m3fn
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7], [1]]


def scaled(config, params, kv_dtype, mesh=None):
    """The parameters with measured scales for pages of `kv_dtype`."""
    ranges = kv_scales.ranges_of_model(config, params, None, dtype=jnp.float32, mesh=mesh)
    model = make_decoder(config, dtype=jnp.float32, page_size=PAGE_SIZE, kv_dtype=kv_dtype, mesh=mesh)
    return kv_scales.with_scales(params, model, kv_scales.scales(ranges, kv_dtype))


def relative_error(found, exact) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(("kv_dtype", "bound"), [(jnp.int8, 0.002), (FP8, 0.005)], ids=["int8", "fp8"])
def test_text_is_as_likely_as_with_full_pages(kv_dtype, bound, repository):
    """The demo's draft on Python source, in chunks of 32, so that most keys are read from pages of earlier steps: bits
    a token within 0.2 and 0.5 % of those with float32 pages.
    """
    folder = repository / "checkpoints" / "demo" / "draft"
    tokenizer = Tokenizer.from_folder(folder)
    loaded = load_model(folder, dtype=jnp.float32)
    ranges = kv_scales.ranges_of_model(loaded.config, loaded.params, tokenizer, dtype=jnp.float32)
    ids = [0, *tokenizer.encode((repository / "jaxinfer" / "config.py").read_text())][:128]
    bits = []
    for dtype in (jnp.float32, kv_dtype):
        model = PagedModel(loaded.config, loaded.params, 1, kv_dtype=dtype)
        if dtype != jnp.float32:
            model.params = kv_scales.with_scales(loaded.params, model.decoder, kv_scales.scales(ranges, dtype))
        logits = model.prefill_all([ids], chunk=32)[0][:-1].astype(np.float64)
        bits.append(np.mean(np.log2(np.exp(logits).sum(1)) - logits[range(127), ids[1:]] / np.log(2)))
    print(f"{jnp.dtype(kv_dtype).name}: {bits}")
    assert model.pages.dtype == kv_dtype
    assert bits[0] != bits[1] and abs(bits[1] / bits[0] - 1) < bound


def test_answers_follow_the_scales(repository):
    """Random models with sharp attention enlarge the rounding of keys, to a few % of the logits with int8 pages. With
    scales that do not fit the keys there would be nothing left of the answer.
    """
    folder = repository / "tests" / "data" / "parity" / "qwen2-bias"
    golden = np.load(folder / "golden.npz")
    loaded = load_model(folder, dtype=jnp.float32)
    exact = np.concatenate([golden[f"logits_{i}"] for i in range(4)])
    errors = []
    for factor in (1, 30):
        params = scaled(loaded.config, loaded.params, jnp.int8)
        params["layers"] = tuple(layer | {"k_scale": layer["k_scale"] * factor} for layer in params["layers"])
        model = PagedModel(loaded.config, params, 4, kv_dtype=jnp.int8)
        logits = model.prefill_all([golden[f"prompt_{i}"].tolist() for i in range(4)], chunk=13)
        errors.append(relative_error(np.concatenate(logits), exact))
    print(errors)
    assert errors[0] < 0.1 < 0.3 < errors[1]


@pytest.mark.parametrize(("shards", "layer_loop"), [(2, "unrolled"), (4, "scanned")])
def test_scales_are_cut_like_the_pages_and_shards_answer_as_one_device(shards, layer_loop):
    """2 kv heads: on 4 shards each is there twice, with its scale."""
    if len(jax.devices()) < shards:
        pytest.skip(f"needs {shards} devices")
    config, mesh = tiny_config(), sharding.make_mesh(shards)
    found = []
    for one, loop in ((None, "unrolled"), (mesh, layer_loop)):
        params = scaled(config, random_params(config, 1, mesh=one, layer_loop=loop), jnp.int8, one)
        model = PagedModel(config, params, len(PROMPTS), mesh=one, kv_dtype=jnp.int8)
        found.append(np.concatenate([*model.prefill_all(PROMPTS, chunk=9), model.decode([5, 6, 7])]))
    np.testing.assert_allclose(found[1], found[0], atol=0.02)  # a key at a half-way point may round the other way
    assert relative_error(found[1], found[0]) < 1e-3
    wanted = abstract_params(config, dtype=jnp.float32, mesh=mesh, layer_loop=layer_loop, kv_scales=True)
    assert jax.tree.structure(partition_specs(params, config, mesh)) == jax.tree.structure(wanted)
    for leaf, shape in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert leaf.shape == shape.shape and leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    layer = params["layers"] if layer_loop == "scanned" else params["layers"][0]
    assert layer["k_scale"].shape[-1] == max(2, shards)
    assert layer["k_scale"].addressable_shards[0].data.shape[-1] == max(2, shards) // shards


def test_ranges_hold_what_was_seen_wherever_it_stands():
    """The same token at other positions: its keys turn, their range does not."""
    config = tiny_config(qk_norm=False)
    params = random_params(config, 1)
    model = make_decoder(config, dtype=jnp.float32, page_size=PAGE_SIZE)
    alone = kv_scales.measure(model, params, [7], PAGE_SIZE)
    assert alone.keys.shape == alone.values.shape == (config.num_layers, config.num_kv_heads)
    many = kv_scales.measure(model, params, [7] * 40, PAGE_SIZE)
    np.testing.assert_allclose(many.keys[0], alone.keys[0], rtol=1e-5)  # the first layer sees the token alone
    pages = model.new_pages(1, PAGE_SIZE)
    rows = (jnp.array([1]), jnp.array([[0]]), jnp.array([0, 1]), jnp.array([0, 0, 1]))
    _, pages = model.forward(params, jnp.array([7]), jnp.array([0]), pages, Rows(*rows), max_q_len=None)
    keys, values = attention.pages_to_dense(pages, 0, jnp.array([0]), 1, implementation=model.implementation)
    largest = np.abs(keys).max((0, 2))
    assert (largest <= alone.keys[0] * 1.00001).all() and (alone.keys[0] <= largest * 2**0.5 * 1.00001).all()
    np.testing.assert_allclose(np.abs(values).max((0, 2)), alone.values[0], rtol=1e-5)


def test_int8_covers_the_range_with_room_and_fp8_is_scaled_only_beyond_its_own():
    ranges = KVRanges(np.array([[12.7, 0.0]], np.float32), np.array([[400.0, 200.0]], np.float32))
    keys, values = kv_scales.scales(ranges, jnp.int8)
    np.testing.assert_allclose(keys, [[0.1 * kv_scales.MARGIN, 1e-6]], rtol=1e-6)
    keys, values = kv_scales.scales(ranges, FP8)
    np.testing.assert_allclose(keys, [[1.0, 1.0]])
    np.testing.assert_allclose(values, [[400 * kv_scales.MARGIN / 448, 1.0]], rtol=1e-6)


def test_a_model_is_measured_with_its_own_text_or_with_ids(repository):
    tokenizer = Tokenizer.from_folder(repository / "checkpoints" / "demo" / "target")
    config = tiny_config(vocab_size=4096)
    ids = kv_scales.calibration_tokens(tokenizer, config)
    assert 256 < len(ids) <= 512
    assert tokenizer.decode(ids) in kv_scales.TEXT.read_text(encoding="utf-8")
    for given, vocab_size, length in ((None, 250, 512), (tokenizer, 250, 512), (None, 250, 64)):
        few = tiny_config(vocab_size=vocab_size, max_position_embeddings=length)
        ids = kv_scales.calibration_tokens(given, few)
        assert len(ids) == length and max(ids) < vocab_size


def test_int8_pages_without_scales_are_refused():
    config = tiny_config()
    model = PagedModel(config, random_params(config, 1), 1, kv_dtype=jnp.int8)
    with pytest.raises(Unsupported, match="int8 pages need k_scale and v_scale"):
        model.decode([1])


def test_pages_of_one_byte_take_half_the_memory_of_bfloat16():
    sizes = {
        dtype: make_decoder(tiny_config(), dtype=jnp.bfloat16, page_size=PAGE_SIZE, kv_dtype=dtype)
        .cache(4, PAGE_SIZE).bytes_per_page
        for dtype in (None, jnp.int8, FP8, jnp.float32)
    }  # fmt: skip
    assert sizes[None] == 2 * sizes[jnp.int8] == 2 * sizes[FP8] == sizes[jnp.float32] // 2
