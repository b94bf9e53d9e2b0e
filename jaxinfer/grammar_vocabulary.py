"""The model's vocabulary as grammars see it: the bytes of each id, which ids end the output, which spell nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.errors import InvalidRequest
from jaxinfer.llguidance_binding import TokenTable
from jaxinfer.structured_output import FIELD
from jaxinfer.types import MASK_BITS, mask_width

if TYPE_CHECKING:
    from jaxinfer.tokenizer import Tokenizer

@dataclass(frozen=True, slots=True)
class Vocabulary:
    """table: bytes of the V ids. known: u32[W], W = ceil(V / 32), the ids that the tokenizer has. eos: u32[W]."""

    table: TokenTable
    eos_ids: frozenset[int]
    known: np.ndarray
    eos: np.ndarray

    @classmethod
    def of(cls, tokenizer: "Tokenizer | None", vocab_size: int, eos_ids: Sequence[int]) -> "Vocabulary":
        """From a model's tokenizer, V and end-of-sequence ids. Raises InvalidRequest where grammars are impossible."""
        if tokenizer is None:
            raise InvalidRequest(FIELD, "needs text, but the model folder has no tokenizer; leave it out")
        if not (tokenizer.is_byte_level or tokenizer.has_byte_fallback):
            raise InvalidRequest(FIELD, "needs a tokenizer whose tokens are pieces of text (byte-level, or with byte "
                                 "fallback), and this model's is not; leave it out")
        if not eos_ids:
            raise InvalidRequest(FIELD, "needs an end-of-sequence token, and this model names none; leave it out")
        tokens = [tokenizer.token_bytes(id) for id in range(vocab_size)]
        ends = frozenset(eos_ids)
        special = [id for id in range(vocab_size) if tokens[id] and (id in ends or tokenizer.is_silent(id, True))]
        known = bits_of([id for id, token in enumerate(tokens) if token] + list(eos_ids), vocab_size)
        return cls(TokenTable(tokens, special, eos_ids[0]), ends, known, bits_of(eos_ids, vocab_size))

    def is_known(self, id: int) -> bool:
        """Whether this id spells anything, as text or as a special token."""
        return 0 <= id < len(self.table.tokens) and bool(self.table.tokens[id])


def bits_of(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """A mask u32[ceil(V / 32)] with the bits of `ids` set."""
    flags = np.zeros(mask_width(vocab_size) * MASK_BITS, np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view("<u4")


def ids_of(mask: np.ndarray) -> np.ndarray:
    """The ids that a mask u32[W] or i32[W] allows, ascending."""
    return np.flatnonzero(np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little"))
