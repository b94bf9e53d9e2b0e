"""Which drafted tokens the target keeps, and what it says after them: exact, whatever is drafted.

Two rules. Requests with a seed, and greedy ones: the target samples every position with the request's own noise, and a
drafted token is kept where it is that very token, so that the output is the one without speculation for any drafter
(Gumbel coupling: Daliri, Musco, Suresh 2024, arXiv:2408.07978). Requests without a seed: rejection sampling with
recovery (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318), which keeps more and gives the
same distribution, if the drafter did sample from what it says that it sampled from; given tokens need no such promise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.noise import Use, first_largest, first_largest_with_noise, keys_for, uniform
from jaxinfer.sampling import SamplingRows, distribution
from jaxinfer.types import SamplerForm


class Candidates(NamedTuple):
    """Distributions of few ids: what a drafter elsewhere says each proposal was sampled from, as it is; the row's own
    sampling fields have no part in it. A given token is the one candidate of its distribution.
    """

    ids: jax.Array  # i32[R, X + 1, N], of the vocabulary; distinct where `chances` is above 0
    chances: jax.Array  # f32[R, X + 1, N], of sum 1


class Drafted(NamedTuple):
    """Proposals for the next X tokens of R rows.

    logits: f32[R, X, V] from which they were sampled by `distribution`, with the row's own sampling fields. candidates:
    what they were sampled from where that is known otherwise. Both None for tokens that no distribution is known of
    (prompt lookup, a drafter that is not trusted).
    beyond: with `candidates`, the token that the drafter has behind a row's proposals. The target's own token there is
    drawn by the second rule too, so that it is the drafter's as often as it can be: what the drafter has said behind it
    is then of use, though it did not wait for the target.
    """

    tokens: jax.Array  # i32[R, X]
    count: jax.Array  # i32[R], the first so many are proposals
    logits: jax.Array | None
    candidates: Candidates | None = None
    beyond: jax.Array | None = None  # i32[R], -1 is none


class Kept(NamedTuple):
    """What R rows say in one round."""

    tokens: jax.Array  # i32[R, X + 1], -1 behind the last
    count: jax.Array  # i32[R], at least 1


def draft_rows(rows: SamplingRows) -> SamplingRows:
    """Sampling fields that a drafter samples with: of rows that follow the first rule with the target's own noise."""
    return rows._replace(key=jnp.where(by_noise(rows)[:, None], rows.key, keys_for(Use.DRAFT, rows.key)))


def by_noise(rows: SamplingRows) -> jax.Array:
    """bool[R]: rows that follow the first rule."""
    return rows.seeded | (rows.temperature == 0.0)


def accept(logits: jax.Array, drafted: Drafted, rows: SamplingRows, positions: jax.Array, form: SamplerForm) -> Kept:
    """The proposals that are kept and one token more.

    logits: f32[R, X + 1, V] of the target, before each proposal and behind the last. positions: i32[R], of the first
    proposed token.
    """
    num_rows, width, vocab_size = logits.shape
    every = positions[:, None] + jnp.arange(width, dtype=jnp.int32)
    if form is SamplerForm.GREEDY:
        own = first_largest(logits.reshape(-1, vocab_size)).reshape(num_rows, width)
        return keep(drafted.tokens == own[:, :-1], drafted, own)
    many = repeated(rows, width)
    targets = distribution(logits.reshape(-1, vocab_size), many, every.reshape(-1), form)
    own = first_largest_with_noise(targets, many.temperature == 0.0, many.key, every.reshape(-1))
    own, targets = own.reshape(num_rows, width), targets.reshape(logits.shape)
    same = drafted.tokens == own[:, :-1]
    kept = jnp.where(by_noise(rows)[:, None], same, passes(targets[:, :-1], drafted, rows, every, form))
    at = num_kept(kept, drafted)
    recovered = recover(targets, drafted, rows, at, positions + at, form)
    rejected = ~by_noise(rows) & (at < drafted.count)
    index = jnp.arange(num_rows)
    if drafted.beyond is not None:
        goes_on = ~by_noise(rows) & (at == drafted.count) & (drafted.beyond >= 0)
        own = own.at[index, at].set(jnp.where(goes_on, drafted.beyond, own[index, at]))
        rejected |= goes_on & ~passes_beyond(targets, drafted, drafted.beyond, rows, positions, form)
    return keep(kept, drafted, own.at[index, at].set(jnp.where(rejected, recovered, own[index, at])))


def repeated(rows: SamplingRows, times: int) -> SamplingRows:
    """Fields of R rows for R * times."""
    return jax.tree.map(lambda field: jnp.repeat(field, times, axis=0), rows)


def num_kept(kept: jax.Array, drafted: Drafted) -> jax.Array:
    """i32[R]: proposals before the first that is not in `kept` bool[R, X]."""
    ahead = jnp.arange(kept.shape[1]) < drafted.count[:, None]
    return jnp.sum(jnp.cumprod(kept & ahead, axis=1, dtype=jnp.int32), axis=1)


def keep(kept: jax.Array, drafted: Drafted, following: jax.Array) -> Kept:
    """following: i32[R, X + 1], what comes where the proposals end."""
    at = num_kept(kept, drafted)[:, None]
    index = jnp.arange(following.shape[1])
    proposed = jnp.pad(drafted.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(index < at, proposed, jnp.where(index == at, following, -1))
    return Kept(tokens, at[:, 0] + 1)


def passes(targets: jax.Array, drafted: Drafted, rows: SamplingRows, positions: jax.Array, form: SamplerForm
           ) -> jax.Array:
    """bool[R, X]: each proposal with probability min(1, p / q). targets: f32[R, X, V] of `distribution`."""
    num_rows, num_drafted = drafted.tokens.shape
    p = jax.nn.softmax(targets, axis=-1)
    chance = of_tokens(p, drafted.tokens)
    every = positions[:, :num_drafted]
    q = proposed_chance(drafted, rows, every, form)
    if q is not None:
        # What the drafter's own distribution forbids was not sampled from it: it is refused.
        chance = jnp.where(q > 0, chance / q, 0.0)
    keys = keys_for(Use.ACCEPTANCE, repeated(rows, num_drafted).key)
    return uniform(keys, every.reshape(-1)).reshape(num_rows, num_drafted) < chance


def passes_beyond(targets: jax.Array, drafted: Drafted, beyond: jax.Array, rows: SamplingRows, positions: jax.Array,
                  form: SamplerForm) -> jax.Array:
    """bool[R]: `passes` of the tokens beyond the proposals, i32[R]. targets: f32[R, X + 1, V]. positions: i32[R], of
    the first proposal.
    """
    index, end = jnp.arange(len(positions)), drafted.count
    only = jax.tree.map(lambda field: field[index, end][:, None], drafted.candidates)
    one = Drafted(beyond[:, None], jnp.ones_like(end), None, only)
    return passes(targets[index, end][:, None], one, rows, (positions + end)[:, None], form)[:, 0]


def proposed_chance(drafted: Drafted, rows: SamplingRows, positions: jax.Array, form: SamplerForm) -> jax.Array | None:
    """q f32[R, X] of each proposal at positions i32[R, X]; None where all are given tokens, so that it is 1."""
    if drafted.candidates is not None:
        ids, chances = (field[:, :drafted.tokens.shape[1]] for field in drafted.candidates)
        return jnp.sum(jnp.where(ids == drafted.tokens[..., None], chances, 0.0), axis=-1)
    if drafted.logits is not None:
        return of_tokens(jax.nn.softmax(draft_distribution(drafted.logits, rows, positions, form), axis=-1),
                         drafted.tokens)
    return None


def draft_distribution(logits: jax.Array, rows: SamplingRows, positions: jax.Array, form: SamplerForm) -> jax.Array:
    """What proposals f32[R, X, V] at positions i32[R, X] were sampled from."""
    num_drafted, vocab_size = logits.shape[1:]
    flat = distribution(logits.reshape(-1, vocab_size), repeated(rows, num_drafted), positions.reshape(-1), form)
    return flat.reshape(logits.shape)


def of_tokens(probabilities: jax.Array, tokens: jax.Array) -> jax.Array:
    """f32[R, X] from [R, X, V]; 0 for ids outside of the vocabulary."""
    inside = (tokens >= 0) & (tokens < probabilities.shape[-1])
    picked = jnp.take_along_axis(probabilities, jnp.where(inside, tokens, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(inside, picked, 0.0)


def recover(targets: jax.Array, drafted: Drafted, rows: SamplingRows, at: jax.Array, positions: jax.Array,
            form: SamplerForm) -> jax.Array:
    """Tokens i32[R] instead of the rejected proposals `at` i32[R], at i32[R] positions: from max(p - q, 0)."""
    index = jnp.arange(len(at))
    refused = jnp.minimum(at, drafted.tokens.shape[1] - 1)
    p = jax.nn.softmax(targets[index, at], axis=-1)
    if drafted.candidates is not None:  # kept few until here: R rows of V, not R times X
        ids, chances = (field[index, at] for field in drafted.candidates)
        q = jnp.zeros_like(p).at[index[:, None], ids].add(chances, mode="drop")
    elif drafted.logits is not None:
        logits = drafted.logits[index, refused][:, None]
        q = jax.nn.softmax(draft_distribution(logits, rows, positions[:, None], form)[:, 0], axis=-1)
    else:
        q = jax.nn.one_hot(drafted.tokens[index, refused], p.shape[-1], dtype=p.dtype)
    rest = jnp.maximum(p - q, 0.0)
    # Nothing is left where both are equal up to rounding: such a rejection has hardly any chance.
    rest = jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p)
    never = jnp.zeros(len(at), bool)
    return first_largest_with_noise(jnp.log(rest), never, keys_for(Use.RECOVERY, rows.key), positions)
