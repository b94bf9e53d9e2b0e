"""Logits and greedy tokens against transformers, through the paged path. tests/data/parity/README.md: the origin."""

import jax.numpy as jnp
import numpy as np
import pytest
from paged_model import PagedModel

from jaxinfer.loading import load_model

CASES = ("llama-tied", "llama-rope3", "mistral-window", "qwen2-bias", "qwen3-qknorm")
MAX_ERROR, MEAN_ERROR = 2e-3, 2e-4
# Closer than this, which of the top two wins is rounding.
MARGIN = 1e-3


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case, repository):
    folder = repository / "tests" / "data" / "parity" / case
    golden = np.load(folder / "golden.npz")
    loaded = load_model(folder, dtype=jnp.float32)
    prompts = [golden[f"prompt_{i}"].tolist() for i in range(4)]
    model = PagedModel(loaded.config, loaded.params, len(prompts))

    logits = model.prefill_all(prompts, chunk=13)
    errors = [np.abs(logits[i] - golden[f"logits_{i}"]) for i in range(4)]
    assert max(error.max() for error in errors) <= MAX_ERROR
    assert max(error.mean() for error in errors) <= MEAN_ERROR

    # Decode follows the reference's tokens, so that one close call does not spoil what comes after it.
    greedy = np.stack([golden[f"greedy_{i}"] for i in range(4)])
    scores = np.stack([rows[-1] for rows in logits])
    clear = 0
    for position in range(greedy.shape[1]):
        top = np.sort(scores, axis=1)
        sure = top[:, -1] - top[:, -2] > MARGIN
        np.testing.assert_array_equal(scores.argmax(1)[sure], greedy[sure, position])
        clear += sure.sum()
        scores = model.decode(greedy[:, position].tolist())
    assert clear > 0.9 * greedy.size
    print(
        f"{case}: max {max(e.max() for e in errors):.1e}, mean {max(e.mean() for e in errors):.1e}, {clear} sure tokens"
    )


@pytest.mark.parametrize("case", ["llama-tied", "mistral-window"])
def test_decoding_gives_the_logits_of_prefill(case, repository):
    """One token a step against all at once: only the order of sums differs."""
    folder = repository / "tests" / "data" / "parity" / case
    loaded = load_model(folder, dtype=jnp.float32)
    prompts = [np.load(folder / "golden.npz")["prompt_2"].tolist()] * 2
    by_prefill = PagedModel(loaded.config, loaded.params, 2).prefill_all(prompts, chunk=20)
    model = PagedModel(loaded.config, loaded.params, 2)
    by_decode = [model.decode([prompt[i] for prompt in prompts]) for i in range(len(prompts[0]))]
    np.testing.assert_allclose(np.stack(by_decode, axis=1), np.stack(by_prefill), atol=1e-4)
