"""The seam between the engine and whatever proposes tokens: propose, observe, and the state that lies between.

A drafter is static: hashable, without arrays. Its state is one pytree beside the target's pages, donated with them from
step to step. Four kinds need no more than this: a draft model (state: its pages; it computes what prefill steps pack),
prompt lookup (state: the tokens of every slot), heads on the target's last hidden state (state: that hidden state of
every slot), and an autoregressive head on all hidden states, as EAGLE's (state: its pages; it sees the target's hidden
states of all prefilled positions and of all that a round kept). What it proposes never changes what is said.

Each call is traced into the target's programs. Slots and rows are those of `row_state.RowState`; B = max_num_seqs + 1.
"""

from typing import Any, NamedTuple, Protocol

import jax

from jaxinfer.acceptance import Candidates, Drafted
from jaxinfer.model import Rows
from jaxinfer.row_state import RowState
from jaxinfer.sampling import SamplingRows
from jaxinfer.types import SamplerForm


class Wanted(NamedTuple):
    """What a round asks a drafter for. X: `Drafter.num_drafted`."""

    slots: jax.Array  # i32[R], out of range in padding rows
    alive: jax.Array  # bool[R]
    count: jax.Array  # i32[R], proposals wanted, 0 to X; more have no pages
    page_indices: jax.Array  # i32[R, M]
    sampling: SamplingRows  # [R], the target's; `acceptance.draft_rows` makes a drafter's of them


class Prefilled(NamedTuple):
    """What a prefill step computed: prompt chunks, and the last token of rows that decode."""

    tokens: jax.Array  # i32[T]
    positions: jax.Array  # i32[T]
    rows: Rows  # kv_lens are those after the step; 0 in rows that computed nothing
    slots: jax.Array  # i32[R]
    decodes: jax.Array  # bool[R], rows that computed the one token sampled last
    hidden: jax.Array  # [T, D], the target's


class Round(NamedTuple):
    """What a decode round brought. W = X + 1 after a round with proposals, 1 after a plain one."""

    slots: jax.Array  # i32[R]
    alive: jax.Array  # bool[R]
    page_indices: jax.Array  # i32[R, M]
    tokens: jax.Array  # i32[R, W], the row's new tokens, -1 behind the last
    count: jax.Array  # i32[R], new tokens; 0 in rows that are not alive
    hidden: jax.Array  # [R, W, D], the target's: [:, i] is what tokens[:, i] was sampled from; nothing from `count` on


class Told(NamedTuple):
    """n = `Drafter.num_caught_up`."""

    slot: jax.Array  # i32[]
    first: jax.Array  # i32[], position of the first token
    tokens: jax.Array  # i32[n], -1 behind the last
    page_indices: jax.Array  # i32[M], of the row


class Drafter(Protocol):
    """Inherit from it: a drafter overrides what it needs.

    params: `draft_pair.Pair`, the target's parameters and the drafter's own. state: the drafter's. rows: the slots'
    `RowState`.
    """

    num_drafted: int
    """Most proposals of a row in a round (X)."""
    may_decline: bool = False
    """`propose` may make fewer proposals than wanted, and is cheap: it runs before it is known whether the round
    verifies any, so that a round without proposals is a plain one. Otherwise it runs where a row wants proposals.
    """
    prompts_cost: bool = False
    """`observe_prefill` is work worth sparing where nothing will be proposed: it does not run in steps that are not
    `StepPlan.watched`, and rows whose prompts it has not seen are not asked for proposals before `catch_up`.
    """
    sees_rounds: bool = True
    """`observe_round` has something to do. Otherwise steps without proposals are programs of the target alone: each
    array that a call takes costs time, 9 us on a CPU, and the drafter's parameters are many.
    """
    num_caught_up: int = 0
    """Tokens of a row that `catch_up` takes at once; 0 where the drafter has no need of it."""

    def new_state(self, num_pages: int, page_size: int) -> Any:
        """On the target's devices."""
        return ()

    def struct(self, num_pages: int, page_size: int) -> Any:
        """The state's shapes and shardings, for compiling before it exists."""
        return ()

    def bytes_per_page(self, page_size: int) -> int:
        """Of the state, for every page of the pool, all shards together."""
        return 0

    @property
    def fixed_bytes(self) -> int:
        """Of the state on each device, whatever the number of pages."""
        return 0

    @property
    def num_entered(self) -> int:
        """Tokens of a row that `enter_proposals` takes; 0 where proposals do not come from outside."""
        return 0

    @property
    def num_candidates(self) -> int:
        """Ids of the distribution that comes with each of them; 0 where none does."""
        return 0

    def catch_up(self, params: Any, state: Any, told: Told) -> Any:
        """The state with tokens of a row that no step showed: the target's keys and values come from the prefix cache,
        or prompts that cost were not worth it. With `prompts_cost`, only tokens that the drafter has not computed. A
        program of its own, before the step.
        """
        return state

    def enter_proposals(self, state: Any, slots: jax.Array, first: jax.Array, tokens: jax.Array,
                        candidates: Candidates | None = None) -> Any:
        """The state with proposals i32[n, num_entered] of the rows at `slots` i32[n] for positions from `first` i32[n]
        on; -1 behind the last. candidates: [n, num_entered, num_candidates], of each. Slots out of range are dropped.
        A program of its own, before the step.
        """
        return state

    def propose(self, form: SamplerForm, params: Any, state: Any, rows: RowState, wanted: Wanted
                ) -> tuple[Drafted, Any]:
        """Proposals i32[R, X] behind each row's last token, at most as many as wanted."""
        raise NotImplementedError

    def observe_prefill(self, params: Any, state: Any, rows: RowState, seen: Prefilled) -> Any:
        """The state after a prefill step, whose rows may still sample a token. rows: rows that begin are in it."""
        return state

    def observe_round(self, params: Any, state: Any, rows: RowState, seen: Round) -> Any:
        """The state after a round, a plain one too. rows: before the round."""
        return state

    def insist(self, state: Any, on: bool) -> Any:
        """The state with which every proposal that is wanted is made, whatever it is worth: while rounds are timed."""
        return state
