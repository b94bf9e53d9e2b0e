"""The token rules of a request: its validated parameters as ids and numbers, and what they may not be together.

No jax here; `rule_table` applies them on the device.
"""

import math
from collections.abc import Callable

from jaxinfer import validation
from jaxinfer.errors import InvalidRequest
from jaxinfer.types import MAX_BAD_WORD_TOKENS, SamplingParams, TokenRules

type Encode = Callable[[str], list[int]]
"""Text to ids without special tokens."""

NO_RULES = TokenRules()


def rules_of(params: SamplingParams, stop_ids: tuple[int, ...], vocab_size: int, encode: Encode) -> TokenRules | None:
    """None where the parameters (of `validation.normalise`) set no rule. encode: called for bad words only.

    Raises InvalidRequest where a bad word has too many tokens, or where together the rules may leave no token.
    """
    spelt = tuple(ids for word in validation.bad_words(params) for ids in spellings(word, encode))
    banned = dict.fromkeys((*(params.banned_token_ids or ()), *(ids[0] for ids in spelt if len(ids) == 1)))
    bias: tuple[tuple[int, float], ...] = (*validation.bias_items(params), *((id_, -math.inf) for id_ in banned))
    allowed = None if params.allowed_token_ids is None else tuple(params.allowed_token_ids)
    rules = TokenRules(
        presence_penalty=params.presence_penalty, frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty, bias=bias, allowed=allowed,
        bad_words=tuple(dict.fromkeys(ids for ids in spelt if len(ids) > 1)))  # fmt: skip
    if rules == NO_RULES:
        return None
    check_leaves_a_token(params, rules, stop_ids, vocab_size)
    return rules


def spellings(word: str, encode: Encode) -> list[tuple[int, ...]]:
    """A bad word's tokens at the beginning of a text and behind a space, where that is another first token.

    Other ways to cut the same text into tokens are not found, nor are longer tokens that contain it.
    """
    plain = word.strip()
    bare, spaced = tuple(encode(plain)), tuple(encode(" " + plain))
    found = [bare] if spaced == bare or spaced[-len(bare):] == bare else [bare, spaced]
    for ids in found:
        if not 1 <= len(ids) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequest("bad_words", f"{plain!r} has {len(ids)} tokens; the limit is {MAX_BAD_WORD_TOKENS}; "
                                 "give a shorter beginning of it")
    return found


def check_leaves_a_token(params: SamplingParams, rules: TokenRules, stop_ids: tuple[int, ...], vocab_size: int) -> None:
    """Raises InvalidRequest unless some token is allowed, never forbidden, and no stop id that min_tokens forbids."""
    forbidden = {id_ for id_, value in rules.bias if value == -math.inf} | {word[-1] for word in rules.bad_words}
    if params.min_tokens:
        forbidden |= set(stop_ids)
    allowed = range(vocab_size) if rules.allowed is None else rules.allowed
    if all(id_ in forbidden for id_ in allowed):
        given = {"allowed_token_ids": rules.allowed is not None, "banned_token_ids": bool(params.banned_token_ids),
                 "bad_words": bool(params.bad_words), "min_tokens": bool(params.min_tokens)}  # fmt: skip
        first, *others = [name for name, used in given.items() if used]
        raise InvalidRequest(first, f"with {' and '.join(others) or 'nothing else'} may leave no token to say; "
                             "allow one that they never forbid")
