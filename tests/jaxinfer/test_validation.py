import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.errors import InvalidRequest
from jaxinfer.types import MAX_STOP_IDS, SamplingParams
from jaxinfer.validation import (
    Limits,
    check_envelope,
    check_text,
    checked_prompt,
    normalise,
    resolve,
    room_for_output,
    shown,
    stop_ids,
    validate,
)

LIMITS = Limits(vocab_size=100, max_model_len=64, eos_token_ids=(2, 3))

ACCEPTED = {
    "n": [1, 16, np.int64(2)],
    "temperature": [0, 0.0, 2.0, 1, np.float32(0.5), np.float64(2), 5e-324],
    "top_p": [1, 1.0, 1e-9, np.float16(0.5)],
    "top_k": [-1, 0, 1, 100, np.int32(100)],
    "min_p": [0, 0.0, 1.0],
    "seed": [None, 0, -(2**63), 2**63 - 1, np.uint64(7)],
    "stop": [None, [], (), "a", ["a"] * 16, ("\n", "é" * 128)],
    "stop_token_ids": [None, [], [0, 99], (5,), list(range(10, 10 + MAX_STOP_IDS - 2)), np.array([4, 5])],
    "max_tokens": [None, 1, 61, np.int16(3)],
    "min_tokens": [0, 16],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "ignore_eos": [True, False],
    "detokenize": [True, False],
    "presence_penalty": [-2, 0, 2.0, np.float32(0.5)],
    "frequency_penalty": [-2.0, 0.0, 1],
    "repetition_penalty": [1e-6, 1, 2.0],
    "logit_bias": [None, {}, {0: 100, 99: -100.0}, {np.int64(5): np.float32(1)}, ((7, 1.0),)],
    "allowed_token_ids": [None, [0], (99, 5), np.array([4, 5])],
    "banned_token_ids": [None, [0, 0], (99,)],
    "bad_words": [None, [], "a", ["a"] * 300, ("é" * 32,)],
}

REFUSED = {
    "n": [0, 17, -1, True, 1.0, "1", None, 10**5000],
    "temperature": [-0.1, 2.1, math.nan, math.inf, -math.inf, 10**400, "1", None, True, Fraction(1, 2), 1j],
    "top_p": [0, 0.0, -0.0, 1.0001, math.nan, "0.5", None, False],
    "top_k": [-2, 101, 5.0, True, "3", None],
    "min_p": [-1e-9, 1.1, math.nan, None],
    "seed": [2**63, -(2**63) - 1, 1.5, "7", True],
    "stop": [["a"] * 17, "", [""], "a" * 257, "é" * 129, [1], b"a", {"a"}, 5, "\ud800", ["ok", "a\udfff"], [None]],
    "stop_token_ids": [[-1], [100], [1.0], ["1"], [True], 5, "12", {1}, list(range(10, 25)), np.array([1.5]),
                       np.array([[1]]), [10**30]],
    "max_tokens": [0, -1, 62, "16", 1.0, True, 10**5000, math.inf],
    "min_tokens": [-1, 17, None, 1.0, True],
    "logprobs": [-1, 21, True, "5", 2.0],
    "prompt_logprobs": [-1, 21, False],
    "ignore_eos": [None, 1, "true"],
    "include_stop_str_in_output": [0],
    "detokenize": [1],
    "skip_special_tokens": [None],
    "presence_penalty": [-2.1, 2.1, math.nan, None, "1", True],
    "frequency_penalty": [-2.1, math.inf, None],
    "repetition_penalty": [0, 1e-7, 5e-324, 2.1, -1, math.nan, None],
    "logit_bias": [{100: 1}, {-1: 1}, {"5": 1}, {5: 101}, {5: math.nan}, {5: None}, {True: 1}, 5, "ab", [5, 6],
                   ((5, 1.0), (5, 2.0)), {1.5: 0}, np.array([1.0, 2.0]), np.array(5), [5] * 200],
    "allowed_token_ids": [[], [100], [-1], [1.5], 5, "5"],
    "banned_token_ids": [[], [100], [True], {1}],
    "bad_words": [["a"] * 301, [""], " ", "a" * 65, [1], 5, b"a", ["\ud800"]],
    "structured_outputs": [[], {"json": {}}, "[0-9]+", 0, False],
}


def params_with(**fields):
    return dataclasses.replace(SamplingParams(), **fields)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in ACCEPTED.items() for v in vs], ids=shown)
def test_accepts(field, value):
    validate([1, 2, 3], params_with(**{field: value}), LIMITS)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in REFUSED.items() for v in vs], ids=shown)
def test_refuses_and_names_the_field(field, value):
    with pytest.raises(InvalidRequest) as error:
        validate([1, 2, 3], params_with(**{field: value}), LIMITS)
    assert error.value.field == field
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("prompt", [[], (), None, "text", 5, [1, "2"], [1.0], [True], [-1], [100], [10**400],
                                    [1] * 64, {1: 2}, b"ab", np.array([[1]]), np.array([0.5]), iter([1]), [None]])
def test_refuses_prompts(prompt):
    with pytest.raises(InvalidRequest) as error:
        validate(prompt, SamplingParams(max_tokens=1), LIMITS)
    assert error.value.field == "prompt"


@pytest.mark.parametrize("prompt", [[0], (99,), [1] * 63, np.array([1, 2]), [np.int32(4), 5]])
def test_accepts_prompts(prompt):
    validate(prompt, SamplingParams(max_tokens=1), LIMITS)


def test_messages_name_limit_value_and_remedy():
    with pytest.raises(InvalidRequest, match=r"40 does not fit.*30 tokens.*max_model_len is 64.*at most 34"):
        validate([1] * 30, SamplingParams(max_tokens=40), LIMITS)
    with pytest.raises(InvalidRequest, match=r"page pool holds 48 tokens"):
        validate([1] * 30, SamplingParams(max_tokens=20), dataclasses.replace(LIMITS, max_kv_tokens=48))


@pytest.mark.parametrize("value", [0, -0.0, 1.5, -1, math.nan])
def test_the_range_of_top_p_is_open_below(value):
    with pytest.raises(InvalidRequest, match=r"top_p: must be a finite number in \(0, 1\], got .*; 1 switches it off"):
        validate([1], params_with(top_p=value), LIMITS)


def test_a_range_that_is_closed_below_says_so():
    with pytest.raises(InvalidRequest, match=r"min_p: must be a finite number in \[0, 1\], got -1"):
        validate([1], params_with(min_p=-1), LIMITS)


@settings(deadline=None)
@given(num_prompt=st.integers(1, 70), max_tokens=st.integers(1, 70))
def test_length_border_is_exact(num_prompt, max_tokens):
    fits = num_prompt + max_tokens <= LIMITS.max_model_len
    try:
        validate([1] * num_prompt, SamplingParams(max_tokens=max_tokens), LIMITS)
    except InvalidRequest:
        assert not fits
    else:
        assert fits


def test_open_max_tokens_is_all_that_is_left():
    open_end = SamplingParams(max_tokens=None, min_tokens=4)
    assert room_for_output(60, open_end, LIMITS) == 4
    validate([1] * 60, open_end, LIMITS)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        validate([1] * 61, open_end, LIMITS)


def test_stop_strings_need_text():
    with pytest.raises(InvalidRequest, match=r"stop: .*detokenize"):
        validate([1], SamplingParams(stop="x", detokenize=False), LIMITS)
    with pytest.raises(InvalidRequest, match=r"stop: .*tokenizer"):
        validate([1], SamplingParams(stop=["x"]), dataclasses.replace(LIMITS, has_tokenizer=False))
    validate([1], SamplingParams(), dataclasses.replace(LIMITS, has_tokenizer=False))


def test_stop_ids_put_end_of_sequence_first_and_once():
    assert stop_ids(SamplingParams(stop_token_ids=[7, 3, 7]), LIMITS) == (2, 3, 7)
    assert stop_ids(SamplingParams(stop_token_ids=[7], ignore_eos=True), LIMITS) == (7,)
    full = SamplingParams(stop_token_ids=list(range(10, 10 + MAX_STOP_IDS)), ignore_eos=True)
    validate([1], full, LIMITS)
    with pytest.raises(InvalidRequest, match="18 stop ids"):
        validate([1], dataclasses.replace(full, ignore_eos=False), LIMITS)


def test_resolve_keeps_defaults_where_nothing_was_sent():
    defaults = SamplingParams(temperature=0.6, top_k=20)
    assert resolve({"top_k": 5}, defaults) == SamplingParams(temperature=0.6, top_k=5)
    for name in ("best_of", "logits_processors", 3, None, "x" * 10**6):
        with pytest.raises(InvalidRequest) as error:
            resolve({name: 1}, defaults)
        assert len(str(error.value)) < 1000


def test_normalise_gives_plain_hashable_values():
    params = SamplingParams(n=np.int32(2), temperature=1, top_p=np.float32(0.5), seed=np.int64(3), stop=["a"],
                            stop_token_ids=[np.int64(1)], max_tokens=np.int8(4))
    plain = normalise(params)
    hash(plain)
    assert plain == params_with(n=2, temperature=1.0, top_p=0.5, seed=3, stop=("a",), stop_token_ids=(1,), max_tokens=4)
    assert [type(getattr(plain, name)) for name in ("n", "temperature", "top_p", "seed")] == [int, float, float, int]
    assert normalise(plain) == plain


@pytest.mark.parametrize(("given", "wanted"), [(5e-324, 0.0), (9e-6, 0.0), (1e-5, 1e-5), (0.5, 0.5)])
def test_temperatures_that_would_overflow_are_greedy(given, wanted):
    assert normalise(SamplingParams(temperature=given)).temperature == wanted


@pytest.mark.parametrize("envelope", [("", 0, ""), (5, 0, ""), ("a" * 257, 0, ""), ("a", 2**31, ""), ("a", True, ""),
                                      ("a", 0.0, ""), ("a", 0, None), ("a", 0, "s" * 257), ("\ud800", 0, "")])
def test_envelope_refused(envelope):
    with pytest.raises(InvalidRequest):
        check_envelope(*envelope)


def test_values_that_cannot_be_printed():
    class Unprintable:
        def __repr__(self):
            raise RuntimeError("repr")

    assert "Unprintable" in shown(Unprintable())
    assert shown(10**5000) == "a value that cannot be printed"
    assert shown("\ud800é") == r"'\ud800\xe9' (str)"
    assert len(shown([["x" * 10**6]] * 100)) < 100
    with pytest.raises(InvalidRequest):
        validate([1], params_with(n=Unprintable()), LIMITS)


def test_text():
    check_text("prompt", "zürich \x00 \U0001f600")
    with pytest.raises(InvalidRequest, match="character 1"):
        check_text("prompt", "a\ud83d")


class Hostile:
    """Raises wherever it is looked at (test runners print values, so its repr behaves)."""

    def __repr__(self):
        return "Hostile()"

    def __getattr__(self, name):
        raise RuntimeError(name)


# A lambda, because runners print strategies and ints of over 4300 digits cannot be printed.
HUGE = st.sampled_from([1, -1]).map(lambda sign: sign * 10**5000)
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | HUGE | st.floats() | st.complex_numbers()
    | st.text(st.characters(exclude_categories=())) | st.binary() | st.fractions() | st.decimals()
    | st.builds(Hostile) | st.builds(np.float32, st.floats(width=32)) | st.builds(np.int8, st.integers(-128, 127)),
    lambda inner: st.lists(inner, max_size=20) | st.tuples(inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12)
FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=GARBAGE | st.lists(st.integers(0, 99), max_size=70),
       fields=st.dictionaries(st.sampled_from(FIELDS), GARBAGE, max_size=4))
def test_garbage_passes_or_is_refused_and_nothing_else(prompt, fields):
    """What passes must also survive the steps behind the validator."""
    params = params_with(**fields)
    try:
        validate(prompt, params, LIMITS)
    except InvalidRequest as error:
        assert error.field in {*FIELDS, "prompt"}
        str(error).encode()
    else:
        plain = normalise(params)
        hash(plain)
        assert 1 <= room_for_output(len(prompt), plain, LIMITS) <= LIMITS.max_model_len - len(prompt)
        assert len(stop_ids(plain, LIMITS)) <= MAX_STOP_IDS
        assert all(math.isfinite(value) for value in (plain.temperature, plain.top_p, plain.min_p))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(garbage=GARBAGE)
def test_garbage_instead_of_params(garbage):
    with pytest.raises(InvalidRequest):
        validate([1], garbage, LIMITS)


def test_a_prompt_that_says_it_is_short_is_counted():
    class Shy:
        dtype, ndim = np.dtype(np.int32), 1

        def __len__(self) -> int:
            return 3

        def tolist(self) -> list[int]:
            return [1] * 500

    with pytest.raises(InvalidRequest, match="has 500 tokens"):
        checked_prompt(Shy(), Limits(vocab_size=100, max_model_len=64))
