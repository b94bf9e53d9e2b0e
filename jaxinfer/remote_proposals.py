"""Proposals that come from outside, as the drafter: a small program enters them, and what is behind the row's newest
token by now is proposed.

A proposal is made for a place in the row. When it arrives the row has gone on: the engine runs a step ahead of what it
has read, and a step has several rounds. So the tokens said since are compared with the beginning of the proposal; where
they are the same, the rest is as good as one that came in time. That is how drafting elsewhere overlaps with
verification here.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import sharding
from jaxinfer.acceptance import Candidates, Drafted
from jaxinfer.drafter import Drafter, Prefilled, Round, Wanted
from jaxinfer.row_state import RowState
from jaxinfer.types import SamplerForm

NOTHING = -1
"""Behind the last proposed token."""


class Entered(NamedTuple):
    """Of every slot. B = max_num_seqs + 1, Y = `RemoteProposals.num_kept`."""

    proposed: jax.Array  # i32[B, Y], NOTHING behind the last
    first: jax.Array  # i32[B], position of proposed[:, 0]
    said: jax.Array  # i32[B, Y], the newest tokens: position p in column p % Y
    always: jax.Array  # bool[], rows are proposed their last token again and again
    candidates: Candidates | None = None  # [B, Y, N], of each of `proposed`; None where the drafter is not trusted


@dataclass(frozen=True)
class RemoteProposals(Drafter):
    """num_kept (Y): proposals of a row that are entered at once, more than num_drafted. mesh: the target's.
    num_candidates (N): ids of the distribution that each was sampled from; 0 takes all proposals as given tokens.
    """

    num_drafted: int
    num_kept: int
    max_num_seqs: int
    mesh: jax.sharding.Mesh | None = None
    num_candidates: int = 0
    may_decline = True

    @property
    def num_entered(self) -> int:
        return self.num_kept

    @property
    def fixed_bytes(self) -> int:
        return 4 * (self.max_num_seqs + 1) * (2 * self.num_kept * (1 + self.num_candidates) + 1)

    @property
    def _place(self) -> jax.sharding.Sharding:
        return sharding.replicated(self.mesh)

    def _empty(self) -> Entered:
        shape = (self.max_num_seqs + 1, self.num_kept)
        each = (*shape, self.num_candidates)
        candidates = Candidates(jnp.zeros(each, jnp.int32), jnp.zeros(each)) if self.num_candidates else None
        return Entered(jnp.full(shape, NOTHING, jnp.int32), jnp.zeros(shape[:1], jnp.int32),
                       jnp.full(shape, NOTHING, jnp.int32), jnp.zeros((), bool), candidates)  # fmt: skip

    def new_state(self, num_pages: int, page_size: int) -> Entered:
        return jax.device_put(self._empty(), self._place)

    def struct(self, num_pages: int, page_size: int) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._place),
                            jax.eval_shape(self._empty))  # fmt: skip

    def insist(self, state: Entered, on: bool) -> Entered:
        return state._replace(always=jax.device_put(jnp.array(on), self._place))

    def enter_proposals(self, state: Entered, slots: jax.Array, first: jax.Array, tokens: jax.Array,
                        candidates: Candidates | None = None) -> Entered:
        def enter(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[slots].set(new, mode="drop")

        return state._replace(proposed=enter(state.proposed, tokens), first=enter(state.first, first),
                              candidates=jax.tree.map(enter, state.candidates, candidates))  # fmt: skip

    def observe_prefill(self, params: Any, state: Entered, rows: RowState, seen: Prefilled) -> Entered:
        """A row in its prompt has no proposals: those in its slot are of the row before."""
        begins = jnp.where(seen.decodes, state.first.shape[0], seen.slots)
        proposed = state.proposed.at[begins].set(NOTHING, mode="drop")
        at = jnp.minimum(seen.rows.cu_q_lens[:-1], seen.tokens.shape[0] - 1)
        return put(state._replace(proposed=proposed), seen.slots, seen.positions[at], seen.tokens[at], seen.decodes)

    def observe_round(self, params: Any, state: Entered, rows: RowState, seen: Round) -> Entered:
        kv_len = rows.kv_len.at[seen.slots].get(mode="clip")
        index = jnp.arange(seen.tokens.shape[1])
        slots = jnp.broadcast_to(seen.slots[:, None], seen.tokens.shape)
        return put(state, slots, kv_len[:, None] + 1 + index, seen.tokens, index < seen.count[:, None])

    def propose(self, form: SamplerForm, params: Any, state: Entered, rows: RowState, wanted: Wanted
                ) -> tuple[Drafted, Entered]:
        """What is left of each row's proposals. The token sampled behind a prefill step is entered here."""
        slots = wanted.slots
        kv_len, last = rows.kv_len.at[slots].get(mode="clip"), rows.last_token.at[slots].get(mode="clip")
        state = put(state, slots, kv_len, last, wanted.alive)
        # What greedy rows are verified against is the target's own token: distributions are of no use.
        trusted = state.candidates is not None and form is not SamplerForm.GREEDY
        position, most = kv_len + 1, self.num_drafted + trusted
        tokens, left = remaining(state, slots, position, most)
        left = jnp.where(state.always, self.num_drafted, left)
        tokens = jnp.where(state.always, last[:, None], tokens)
        count = jnp.minimum(wanted.count, left)
        if not trusted:
            return Drafted(tokens, count, None), state
        beyond = jnp.where(left > count, tokens[jnp.arange(len(count)), count], NOTHING)
        candidates = candidates_of(state, slots, position, most)
        return Drafted(tokens[:, :self.num_drafted], count, None, candidates, beyond), state


def put(state: Entered, slots: jax.Array, positions: jax.Array, tokens: jax.Array, known: jax.Array) -> Entered:
    """The state with those tokens said that are `known`; all of one shape, of a row Y at most."""
    width = state.said.shape[1]
    columns = jnp.where(known, positions % width, width)
    return state._replace(said=state.said.at[slots, columns].set(tokens, mode="drop"))


def remaining(state: Entered, slots: jax.Array, position: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """The proposals of each row from its next `position` i32[R] on: tokens i32[R, most] and how many of them count,
    i32[R]: none unless what was said since is what they begin with.
    """
    width = state.said.shape[1]
    proposed = state.proposed.at[slots].get(mode="clip")
    first = state.first.at[slots].get(mode="clip")[:, None]
    index = jnp.arange(width)
    done = position[:, None] - first
    said = state.said.at[slots[:, None], (first + index) % width].get(mode="clip")
    follows = jnp.all((said == proposed) | (index >= done), axis=1) & (done[:, 0] >= 0)
    left = jnp.sum(proposed != NOTHING, axis=1) - done[:, 0]
    tokens = jnp.maximum(jnp.take_along_axis(proposed, columns_of(done, most, width), axis=1), 0)
    return tokens, jnp.where(follows, jnp.maximum(left, 0), 0)


def columns_of(done: jax.Array, most: int, width: int) -> jax.Array:
    """i32[R, most]: where the proposals behind the first `done` i32[R, 1] lie."""
    return jnp.clip(done + jnp.arange(most), 0, width - 1)


def candidates_of(state: Entered, slots: jax.Array, position: jax.Array, most: int) -> Candidates:
    """[R, most, N]: of the tokens of `remaining`, what each was sampled from."""
    done = position - state.first.at[slots].get(mode="clip")
    columns = columns_of(done[:, None], most, state.proposed.shape[1])
    # Two indices at once: a whole row's candidates would be [R, Y, N].
    return Candidates(*(field.at[slots[:, None], columns].get(mode="clip") for field in state.candidates or ()))
