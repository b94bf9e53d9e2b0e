"""Every kind of rotary embedding against numbers computed by its published formula, one pair at a time in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from paged_model import tiny_config

from jaxinfer.config import RopeConfig
from jaxinfer.errors import InvalidConfig
from jaxinfer.models.rope import apply_rope, inverse_frequencies, rope_tables

HEAD = 64
MAX_POSITION = 4096


def plain(pair: int, theta: float) -> float:
    return 1.0 / theta ** (2 * pair / HEAD)


def llama3(pair: int) -> float:
    """transformers 5, modeling_rope_utils: three cases by wavelength; theta 500000, factor 8, 1 to 4, original 1024."""
    frequency = plain(pair, 500_000.0)
    wavelength = 2 * math.pi / frequency
    if wavelength < 1024 / 4.0:
        return frequency
    if wavelength > 1024 / 1.0:
        return frequency / 8.0
    smooth = (1024 / wavelength - 1.0) / (4.0 - 1.0)
    return (1 - smooth) * frequency / 8.0 + smooth * frequency


def yarn(pair: int, truncate: bool = True) -> float:
    """transformers 5, modeling_rope_utils: a ramp between correction dimensions; factor 4, original 1024, 32 and 1."""
    low = HEAD * math.log(1024 / (32 * 2 * math.pi)) / (2 * math.log(10_000.0))
    high = HEAD * math.log(1024 / (1 * 2 * math.pi)) / (2 * math.log(10_000.0))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, HEAD - 1)
    extrapolated = 1 - min(max((pair - low) / (high - low), 0.0), 1.0)
    frequency = plain(pair, 10_000.0)
    return frequency / 4.0 * (1 - extrapolated) + frequency * extrapolated


LLAMA3 = RopeConfig("llama3", 500_000.0, 8.0, 1024, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeConfig("yarn", 10_000.0, 4.0, 1024)
YARN_WHOLE = RopeConfig("yarn", 10_000.0, 4.0, 1024, beta_fast=32.0, beta_slow=1.0, truncate=False)
KINDS = {
    "default": (RopeConfig(), lambda pair: plain(pair, 10_000.0), 1.0),
    "linear": (RopeConfig("linear", 10_000.0, 4.0), lambda pair: plain(pair, 10_000.0) / 4, 1.0),
    "dynamic": (RopeConfig("dynamic", 10_000.0, 4.0), lambda pair: plain(pair, 10_000.0), 1.0),
    "llama3": (LLAMA3, llama3, 1.0),
    "yarn": (YARN, yarn, 0.1 * math.log(4.0) + 1.0),
    "yarn-untruncated": (YARN_WHOLE, lambda pair: yarn(pair, False), 0.1 * math.log(4.0) + 1.0),
}


@pytest.mark.parametrize("name", KINDS)
def test_frequencies_follow_the_published_formula(name):
    rope, formula, factor = KINDS[name]
    frequencies, found = inverse_frequencies(rope, HEAD, MAX_POSITION)
    np.testing.assert_allclose(frequencies, [formula(pair) for pair in range(HEAD // 2)], rtol=1e-12)
    assert found == pytest.approx(factor, rel=1e-12)


# What transformers 5.23's own functions give in float32 at pairs 0, 5, 12, 20 and 31 of the kinds above.
PAIRS = [0, 5, 12, 20, 31]
TRANSFORMERS = {
    "linear": (0.25, 0.059284348, 0.0079056947, 0.00079056947, 3.3338038e-05),
    "dynamic": (1, 0.23713739, 0.031622779, 0.0031622779, 0.00013335215),
    "llama3": (1, 0.12868738, 0.0013125695, 3.4281024e-05, 3.7673229e-07),
    "yarn": (1, 0.23713739, 0.01885204, 0.00079056947, 3.3338038e-05),
    "yarn-untruncated": (1, 0.23713739, 0.019126777, 0.00079056947, 3.3338038e-05),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_frequencies_are_those_of_transformers(name):
    frequencies, _ = inverse_frequencies(KINDS[name][0], HEAD, MAX_POSITION)
    np.testing.assert_allclose(frequencies[PAIRS], TRANSFORMERS[name], rtol=2e-6)


def test_yarn_attention_factor_is_stated_or_a_ratio():
    stated = RopeConfig("yarn", factor=4.0, original_max_position=1024, attention_factor=1.5)
    assert inverse_frequencies(stated, HEAD, MAX_POSITION)[1] == 1.5
    deepseek = RopeConfig("yarn", factor=40.0, original_max_position=1024, mscale=1.0, mscale_all_dim=0.5)
    ratio = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert inverse_frequencies(deepseek, HEAD, MAX_POSITION)[1] == pytest.approx(ratio, rel=1e-12)
    assert inverse_frequencies(RopeConfig("yarn", factor=1.0), HEAD, MAX_POSITION)[1] == 1.0


def test_an_unknown_kind_is_refused():
    with pytest.raises(InvalidConfig, match="longrope"):
        inverse_frequencies(RopeConfig("longrope"), HEAD, MAX_POSITION)


def test_tables_hold_the_angle_of_each_position_times_the_factor():
    config = tiny_config(rope=YARN, head_dim=HEAD, max_position_embeddings=MAX_POSITION)
    positions = jnp.array([0, 1, 1000], jnp.int32)
    cos, sin = rope_tables(config, positions)
    factor = 0.1 * math.log(4.0) + 1.0
    angles = np.array([[position * yarn(pair) for pair in range(HEAD // 2)] for position in (0, 1, 1000)])
    # float32 angles of up to 1000 radians are exact to 6e-5.
    np.testing.assert_allclose(cos, np.cos(angles) * factor, atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angles) * factor, atol=1e-4)


def test_rotation_keeps_lengths_and_turns_by_distance_only():
    config = tiny_config(head_dim=HEAD)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, HEAD)), jnp.float32) for _ in range(2))

    def score(query_at: int, key_at: int) -> float:
        turned = [apply_rope(x, *rope_tables(config, jnp.array([at]))) for x, at in ((q, query_at), (k, key_at))]
        np.testing.assert_allclose(jnp.linalg.norm(turned[0]), jnp.linalg.norm(q), rtol=1e-5)
        return float(jnp.vdot(turned[0], turned[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-3)
    assert abs(score(7, 3) - score(7, 6)) > 1e-2
