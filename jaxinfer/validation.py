"""The one validator of requests, for gRPC, HTTP, offline and batch alike.

Whatever a client sends, `validate` either returns or raises InvalidRequest: ranges are closed, types are
strict (no string for a number, no bool for an int), and nothing is clipped or truncated silently.
"""

import contextlib
import dataclasses
import numbers
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from jaxinfer.errors import InvalidRequest
from jaxinfer.request_limits import DEFAULT_LIMITS, RequestLimits
from jaxinfer.types import MAX_STOP_IDS, SamplingParams, StructuredOutput

MAX_NAME_BYTES = 256
"""Request ids and cache salts are kept and hashed per request; unbounded ones cost memory."""
MAX_TEMPERATURE = 2.0
GREEDY_BELOW = 1e-5
"""A temperature under this is greedy, as in vLLM: divided by a much smaller one, logits overflow float32."""
MAX_PENALTY = 2.0
MIN_REPETITION = 1e-6
"""Logits are divided by the repetition penalty, and by the temperature after that: both together must not overflow."""
MAX_LOGIT_BIAS = 100.0
"""As in the OpenAI API; both are added to logits, which lie within about +-30."""
MAX_BAD_WORD_BYTES = 64
INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)
SHOWN_CHARS = 60
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_SHORT = reprlib.Repr(maxlevel=3, maxstring=SHOWN_CHARS, maxother=SHOWN_CHARS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a model and an engine can take; token counts, all inclusive.

    vocab_size: V, ids lie in [0, V). max_model_len: longest prompt + output. max_kv_tokens: tokens the whole
    page pool holds, None when it is known to hold max_model_len. eos_token_ids: end-of-sequence ids of the
    model; they share MAX_STOP_IDS with a request's own. has_tokenizer: text can be made from ids. request: what an
    operator allows.
    """

    vocab_size: int
    max_model_len: int
    max_kv_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    has_tokenizer: bool = True
    request: RequestLimits = DEFAULT_LIMITS

    @property
    def max_tokens(self) -> int:
        """Longest prompt + output that can run at all."""
        return min(self.max_model_len, self.max_kv_tokens or self.max_model_len)


def validate(prompt: Any, params: Any, limits: Limits) -> None:
    """Checks prompt ids and sampling parameters together. Raises InvalidRequest, and nothing else."""
    ids = checked_prompt(prompt, limits)
    if not isinstance(params, SamplingParams):
        raise InvalidRequest("sampling_params", f"must be SamplingParams, got {shown(params)}; "
                             "make it with SamplingParams(temperature=..., max_tokens=...)")
    _check_sampling(params, limits)
    _check_flags(params)
    _check_lengths(len(ids), params, limits)
    _check_stop_strings(params, limits)
    _check_stop_ids(params, limits)
    _check_token_rules(params, limits)
    if not isinstance(params.structured_outputs, StructuredOutput | None):  # `structured_output.checked` does the rest
        raise InvalidRequest("structured_outputs", f"must be StructuredOutput, got {shown(params.structured_outputs)}; "
                             "make it with StructuredOutput(json=...)")
    for name in ("logprobs", "prompt_logprobs"):
        _optional_int(name, getattr(params, name), 0, limits.request.max_logprobs)


def checked_prompt(prompt: Any, limits: Limits) -> tuple[int, ...]:
    """The prompt as plain ints. Takes a list, a tuple or a one-dimensional integer array."""
    _check_prompt_length(_count_of(prompt), limits)  # before each id is looked at
    ids = _known_ids("prompt", prompt, limits.vocab_size)
    _check_prompt_length(len(ids), limits)  # a stranger's object may say what it likes of itself
    return ids


def _check_prompt_length(count: int, limits: Limits) -> None:
    if count >= limits.max_tokens:
        raise InvalidRequest("prompt", f"has {count} tokens; with at least one token of output the limit is "
                             f"{limits.max_tokens - 1} ({_length_rule(limits)}); shorten the prompt")


def checked_scored(token_ids: Any, limits: Limits) -> tuple[int, ...]:
    """Tokens to compute logits for, as plain ints: nothing is generated, so they may fill the whole length."""
    ids = _known_ids("token_ids", token_ids, limits.vocab_size)
    if len(ids) > limits.max_tokens:
        raise InvalidRequest("token_ids", f"has {len(ids)} tokens; the limit is {limits.max_tokens} "
                             f"({_length_rule(limits)}); give fewer")
    return ids


def room_for_output(num_prompt_tokens: int, params: SamplingParams, limits: Limits) -> int:
    """Most tokens the request may generate: its max_tokens, or all that is left of the model's length."""
    left = limits.max_tokens - num_prompt_tokens
    return left if params.max_tokens is None else int(params.max_tokens)


def stop_ids(params: SamplingParams, limits: Limits) -> tuple[int, ...]:
    """Every id that ends a row, without repeats: end-of-sequence (unless ignored), then the request's own."""
    eos = () if params.ignore_eos else limits.eos_token_ids
    return tuple(dict.fromkeys((*eos, *_own_stop_ids(params))))


def stop_strings(params: SamplingParams) -> tuple[str, ...]:
    """`stop` as a tuple, whichever of its forms was given."""
    return texts_of(params.stop)


def _own_stop_ids(params: SamplingParams) -> tuple[int, ...]:
    return () if params.stop_token_ids is None else tuple(map(int, params.stop_token_ids))


def bad_words(params: SamplingParams) -> tuple[str, ...]:
    """`bad_words` as a tuple, whichever of its forms was given."""
    return texts_of(params.bad_words)


def texts_of(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One string or several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def bias_items(params: SamplingParams) -> tuple[tuple[int, float], ...]:
    """`logit_bias` as pairs, whichever of its forms was given."""
    bias = () if params.logit_bias is None else params.logit_bias
    return tuple(bias.items()) if isinstance(bias, Mapping) else tuple(bias)


def resolve(fields: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """SamplingParams from the fields a client really sent; `defaults` (the model's) fill the others.

    A front that knows which fields were present (proto3 optional, JSON keys) calls this; SamplingParams built
    by a caller are never merged with anything, as in vLLM. Raises InvalidRequest on an unknown field.
    """
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    for name in fields:
        if name not in known:
            raise InvalidRequest(shown(name) if not isinstance(name, str) else name[:SHOWN_CHARS],
                                 f"is not a sampling parameter; there are {', '.join(sorted(known))}")
    return dataclasses.replace(defaults, **fields)


def normalise(params: SamplingParams) -> SamplingParams:
    """Validated parameters as plain Python values (no numpy scalars, tuples for lists): hashable, serialisable.

    A temperature under GREEDY_BELOW is 0.
    """
    changes: dict[str, Any] = {name: float(getattr(params, name))
                               for name in ("temperature", "top_p", "min_p", *PENALTIES)}
    if changes["temperature"] < GREEDY_BELOW:
        changes["temperature"] = 0.0
    for name in ("n", "top_k", "min_tokens", "seed", "max_tokens", "logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        changes[name] = None if value is None else int(value)
    changes["stop"] = stop_strings(params) or None
    changes["stop_token_ids"] = _own_stop_ids(params) or None
    changes["logit_bias"] = tuple(sorted((int(id_), float(value)) for id_, value in bias_items(params))) or None
    for name in ("allowed_token_ids", "banned_token_ids"):
        ids = getattr(params, name)
        changes[name] = None if ids is None else tuple(dict.fromkeys(map(int, ids)))
    changes["bad_words"] = bad_words(params) or None
    changes = {name: value for name, value in changes.items() if value is not getattr(params, name)}
    return dataclasses.replace(params, **changes) if changes else params  # parameters are frozen


def check_envelope(request_id: Any, priority: Any, cache_salt: Any) -> None:
    """What travels beside prompt and parameters: an id, a priority (int32) and a salt, both at most 256 bytes."""
    check_text("request_id", request_id, max_bytes=MAX_NAME_BYTES)
    if not request_id:
        raise InvalidRequest("request_id", "is empty; leave it out or give a name")
    _int("priority", priority, *INT32)
    check_text("cache_salt", cache_salt, max_bytes=MAX_NAME_BYTES)


def check_text(field: str, value: Any, *, max_bytes: int | None = None) -> None:
    """A str that is proper Unicode (no lone surrogates) and at most `max_bytes` of UTF-8."""
    if not isinstance(value, str):
        raise InvalidRequest(field, f"must be a string, got {shown(value)}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, f"has a lone surrogate at character {error.start}, which is not text; "
                             "send well-formed Unicode") from None
    if max_bytes is not None and size > max_bytes:
        raise InvalidRequest(field, f"is {size} bytes of UTF-8; the limit is {max_bytes}")


def shown(value: Any) -> str:
    """A short, always printable form of a refused value, with its type unless that is obvious.

    Huge ints and broken reprs do not raise.
    """
    try:
        text = _SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    except Exception:  # a hostile or enormous object must not turn a refusal into a crash
        text = "a value that cannot be printed"
    return text[:SHOWN_CHARS] if type(value) in (int, float) else f"{text[:SHOWN_CHARS]} ({type(value).__name__})"


def _check_sampling(params: SamplingParams, limits: Limits) -> None:
    _int("n", params.n, 1, limits.request.max_n)
    _float("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    _float("top_p", params.top_p, 0.0, 1.0, above_low=True, hint="1 switches it off, temperature=0 is greedy")
    _int("top_k", params.top_k, -1, limits.vocab_size, hint="0 or -1 switches it off")
    _float("min_p", params.min_p, 0.0, 1.0)
    _optional_int("seed", params.seed, *INT64)


def _check_flags(params: SamplingParams) -> None:
    for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"):
        value = getattr(params, name)
        if not isinstance(value, bool):
            raise InvalidRequest(name, f"must be true or false, got {shown(value)}")


def _check_lengths(num_prompt: int, params: SamplingParams, limits: Limits) -> None:
    left = limits.max_tokens - num_prompt
    if params.max_tokens is not None:
        _int("max_tokens", params.max_tokens, 1, None)
        if params.max_tokens > left:
            raise InvalidRequest("max_tokens", f"{shown(params.max_tokens)} does not fit: the prompt has {num_prompt} "
                                 f"tokens and {_length_rule(limits)}; use at most {left}, or leave it open (None)")
    _int("min_tokens", params.min_tokens, 0, room_for_output(num_prompt, params, limits),
         hint="it cannot exceed the tokens that may be generated")


def _check_stop_strings(params: SamplingParams, limits: Limits) -> None:
    stops = _checked_texts("stop", params.stop, limits.request.max_stops, limits.request.max_stop_bytes)
    if "" in stops:
        raise InvalidRequest("stop", "holds an empty string, which would stop at once; leave it out")
    if stops and not params.detokenize:
        raise InvalidRequest("stop", "needs text, but detokenize is False; set detokenize=True or use stop_token_ids")
    if stops and not limits.has_tokenizer:
        raise InvalidRequest("stop", "needs text, but the model folder has no tokenizer; use stop_token_ids")


def _checked_texts(field: str, value: Any, most: int, max_bytes: int) -> tuple[str, ...]:
    """None, one string or a list of them."""
    if not isinstance(value, (str, list, tuple, NoneType)):
        raise InvalidRequest(field, f"must be a string or a list of strings, got {shown(value)}")
    texts = texts_of(value)
    if len(texts) > most:
        raise InvalidRequest(field, f"has {len(texts)} strings; the limit is {most}")
    for text in texts:
        check_text(field, text, max_bytes=max_bytes)
    return texts


def _check_stop_ids(params: SamplingParams, limits: Limits) -> None:
    if params.stop_token_ids is None:
        return
    _check_count("stop_token_ids", params.stop_token_ids, MAX_STOP_IDS, "give each id once")
    ids = _plain_ids("stop_token_ids", params.stop_token_ids)
    _check_id_range("stop_token_ids", ids, limits.vocab_size)
    count = len(stop_ids(params, limits))
    if count > MAX_STOP_IDS:
        raise InvalidRequest("stop_token_ids", f"with the model's end-of-sequence ids there are {count} stop ids; "
                             f"the limit is {MAX_STOP_IDS}; give fewer")


def _check_token_rules(params: SamplingParams, limits: Limits) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        _float(name, getattr(params, name), -MAX_PENALTY, MAX_PENALTY, hint="0 switches it off")
    _float("repetition_penalty", params.repetition_penalty, MIN_REPETITION, MAX_PENALTY, hint="1 switches it off")
    _check_logit_bias(params, limits)
    for name in ("allowed_token_ids", "banned_token_ids"):
        ids = getattr(params, name)
        if ids is not None:
            _check_count(name, ids, limits.vocab_size, "that is the vocabulary; give each id once")
            _known_ids(name, ids, limits.vocab_size)
    _check_bad_words(params, limits)


def _check_logit_bias(params: SamplingParams, limits: Limits) -> None:
    _check_count("logit_bias", params.logit_bias, limits.request.max_logit_bias,
                 "use allowed_token_ids or banned_token_ids")
    try:
        items = bias_items(params)
        ids = _plain_ids("logit_bias", [id_ for id_, _ in items])
    except Exception:  # a stranger's object may raise anything
        raise InvalidRequest("logit_bias", f"must map token ids to numbers, got {shown(params.logit_bias)}") from None
    _check_id_range("logit_bias", ids, limits.vocab_size)
    if len(set(ids)) < len(ids):
        raise InvalidRequest("logit_bias", "names a token id twice; give each id once")
    for id_, value in items:
        _float("logit_bias", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, hint=f"token {id_}; banned_token_ids forbids one")


def _check_count(field: str, value: Any, most: int, hint: str) -> None:
    """Before each is looked at: a long list of repeats would take a while."""
    if (count := _count_of(value)) > most:
        raise InvalidRequest(field, f"has {count} ids; the limit is {most}; {hint}")


def _count_of(value: Any) -> int:
    """0 for what is no list at all: what comes next refuses it."""
    with contextlib.suppress(Exception):
        return len(value)
    return 0


def _check_bad_words(params: SamplingParams, limits: Limits) -> None:
    words = _checked_texts("bad_words", params.bad_words, limits.request.max_bad_words, MAX_BAD_WORD_BYTES)
    if not all(map(str.strip, words)):
        raise InvalidRequest("bad_words", "holds an empty or blank string, which would forbid everything; leave it out")
    if words and not limits.has_tokenizer:
        raise InvalidRequest("bad_words", "needs text, but the model folder has no tokenizer; use banned_token_ids")


def _known_ids(field: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """At least one id, all of the vocabulary."""
    ids = _plain_ids(field, value)
    if not ids:
        raise InvalidRequest(field, "is empty; give at least one token")
    _check_id_range(field, ids, vocab_size)
    return ids


def _plain_ids(field: str, value: Any) -> tuple[int, ...]:
    """Ids as a tuple of int. The common case (all exact ints) costs one pass in C."""
    if not isinstance(value, (list, tuple)):
        value = _array_items(field, value)
    if set(map(type, value)) <= {int}:
        return tuple(value)
    for position, item in enumerate(value):
        if not _is_int(item):
            raise InvalidRequest(field, f"token ids are integers, got {shown(item)} at position {position}")
    return tuple(map(int, value))


def _array_items(field: str, value: Any) -> list[Any]:
    # Duck-typed, so that numpy arrays pass without this module importing numpy.
    with contextlib.suppress(Exception):  # not an array: a stranger's attributes may raise anything
        if value.dtype.kind in ("i", "u") and value.ndim == 1:
            return value.tolist()
    raise InvalidRequest(field, f"must be a list of token ids, got {shown(value)}")


def _check_id_range(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for bad in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= bad < vocab_size:
            raise InvalidRequest(field, f"token id {shown(bad)} is not in the vocabulary, [0, {vocab_size})")


def _is_int(value: Any) -> bool:
    if type(value) is int:  # without the question to `numbers`, which takes ten times as long
        return True
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_float(value: Any) -> bool:
    if type(value) is float:
        return True
    # numpy's floats are registered as Real; Fraction is Real too, but nobody means to send one.
    return _is_int(value) or (isinstance(value, numbers.Real) and not isinstance(value, (bool, numbers.Rational)))


def _int(field: str, value: Any, low: int, high: int | None, hint: str = "") -> None:
    if not _is_int(value):
        raise InvalidRequest(field, f"must be an integer, got {shown(value)}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise InvalidRequest(field, f"must be {wanted}, got {shown(value)}" + (f"; {hint}" if hint else ""))


def _optional_int(field: str, value: Any, low: int, high: int) -> None:
    if value is not None:
        _int(field, value, low, high)


def _float(field: str, value: Any, low: float, high: float, *, above_low: bool = False, hint: str = "") -> None:
    """A number in [low, high]; with `above_low`, in (low, high]."""
    if not _is_float(value):
        raise InvalidRequest(field, f"must be a number, got {shown(value)}")
    # NaN fails every comparison, so it is refused here too.
    if not low <= value <= high or (above_low and value == low):
        bracket = "(" if above_low else "["
        raise InvalidRequest(field, f"must be a finite number in {bracket}{low:g}, {high:g}], got {shown(value)}"
                             + (f"; {hint}" if hint else ""))


def _length_rule(limits: Limits) -> str:
    if limits.max_tokens < limits.max_model_len:
        return f"the page pool holds {limits.max_tokens} tokens"
    return f"max_model_len is {limits.max_model_len}"
