"""The rows "tensor parallel" and "int8 pages" of the feature table: a real model on two devices with pages of int8.

What the engine said is scored by the same engine: at each position the token must be the one that the reference takes
of these logits.
"""

import re
from functools import cache

import numpy as np
import pytest
from features import FIRST, LETTERS, PATTERN, REQUEST, SECOND, params_of
from reference_sampler import candidates, noise

from jaxinfer import LLM, SamplingParams

CLOSE = 1e-3
"""By how much logits of one token may differ where they were computed in other batches."""
PROMPT = "def first(values):\n    for value in va"


@pytest.fixture(scope="module")
def llm():
    with LLM("demo-draft", dtype="float32", kv_cache_dtype="int8", tensor_parallel_size=2, max_num_seqs=2,
             max_model_len=128, num_pages=64, max_num_batched_tokens=16, quiet=True) as found:
        yield found


@pytest.fixture(scope="module")
def answered(llm):
    """By feature: the request and its output, all of one batch."""
    params = [SamplingParams(**params_of(name, seed=seed)) for seed, name in enumerate(REQUEST)]
    outputs = llm.generate([PROMPT] * len(params), params, use_tqdm=False)
    requests = [llm.core.intake.request(PROMPT, one) for one in params]
    return dict(zip(REQUEST, zip(requests, outputs, strict=True), strict=True))


@pytest.fixture(scope="module")
def legal(llm):
    """What `features.PATTERN` allows behind an even and an odd number of letters."""
    tokenizer = llm.core.tokenizer

    @cache
    def by_parity(odd: int) -> frozenset[int]:
        pattern = re.compile(f"[{SECOND}]?([{FIRST}][{SECOND}])*[{FIRST}]?" if odd else f"({PATTERN})?[{FIRST}]?")
        texts = {id_: tokenizer.decode([id_]) for id_ in range(1, llm.core.info.vocab_size)}
        return frozenset(id_ for id_, text in texts.items() if text and set(text) <= set(LETTERS) and (
            pattern.fullmatch(text) and (not odd or text[0] in SECOND)))

    def of(said: list[int]) -> set[int]:
        length = len(tokenizer.decode(said))
        return by_parity(length % 2) | ({0} if length and not length % 2 else set())

    return of


@pytest.mark.parametrize("name", REQUEST)
@pytest.mark.parametrize("row", ["tensor parallel", "int8 pages"])
def test_the_reference_says_the_same(row, name, llm, answered, legal):
    one, output = answered[name]
    for sample in output.outputs:
        said = list(sample.token_ids)
        raw = llm.logits([*one.prompt, *said])[len(one.prompt) - 1:]
        for count, token in enumerate(said):
            values = candidates(raw[count], one, said[:count], legal if one.grammar else None)
            if one.params.temperature > 0 and one.params.seed is not None:
                values = values + noise(one.seed, sample.index, len(one.prompt) + count, len(values))
            lowest = -np.inf if one.params.temperature > 0 and one.params.seed is None else values.max() - CLOSE
            assert values[token] > lowest, f"token {count}, {token}"
        assert sample.finish_reason == ("length" if len(said) == one.max_tokens and said[-1] not in one.stop_ids
                                        and sample.stop_reason is None else "stop")
        assert not any(stop in sample.text for stop in one.params.stop or ())
        assert (sample.text == "") == (not one.params.detokenize)
        assert (sample.logprobs is None) == (one.params.logprobs is None)
    assert (output.prompt_logprobs is None) == (one.params.prompt_logprobs is None)
