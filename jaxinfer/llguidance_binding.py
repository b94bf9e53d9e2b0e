"""What this project says to llguidance: the import, limits, token table and grammar texts.

llguidance computes, from the text so far, which tokens may follow (github.com/guidance-ai/llguidance).
Nothing here is imported before a request brings a grammar.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxinfer.errors import InvalidRequest
from jaxinfer.schema_patterns import narrowed
from jaxinfer.structured_output import FIELD, LIBRARY_OPTIONS
from jaxinfer.types import StructuredOutput

if TYPE_CHECKING:
    import llguidance

INITIAL_FUEL = 1_000_000
"""Steps to build a grammar's expressions; about 20 ms."""
STEP_FUEL = 200_000
"""Steps of the lexer in one mask; about 15 ms."""
STEP_ITEMS = 50_000
"""Parser items in one mask: 3 ms where places have few, up to 30 of an ambiguous grammar (`e: e e | "a" | "b"`)."""
ROW_ITEMS = 1000
"""Parser items at one place of the text: a grammar with more alternatives at once takes over 20 ms a mask."""
LEXER_STATES = 16_384
"""States that the masks of one grammar may add up to; about 1.5 kB each."""

HEADER = '%llguidance {"no_forcing": true}\nstart: @body\n'
"""no_forcing: any tokens that spell a legal text are legal, whether the tokenizer would choose them or not. So a mask
depends on the text alone: proposals of a draft model and replayed tokens meet the same masks.
"""
WHITESPACE = r" |\n(?: {0,32}|\t{0,8})"
"""Between JSON's tokens, at most once: json.dumps' own forms. Without a bound a model may go on with spaces forever."""
MAX_PROBLEM_CHARS = 300


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Bytes of each of the model's V ids, b"" for those that spell nothing; special ids are no text.

    The form that llguidance expects of a tokenizer written in Python.
    """

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    bos_token_id: None = None
    is_tokenizer_wrapper: bool = True

    def __call__(self, text: Any) -> list[int]:
        raise NotImplementedError("with no_forcing nothing is tokenised")


def library() -> Any:
    """The module. Raises InvalidRequest where it is not installed: only requests with a grammar need it."""
    try:
        import llguidance
    except ImportError:
        raise InvalidRequest(FIELD, "needs the package llguidance, which is not installed; "
                             "pip install '.[grammar]' in the checkout, or leave it out") from None
    return llguidance


def make_tokenizer(table: TokenTable, eos_ids: Sequence[int]) -> "llguidance.LLTokenizer":
    """About 10 ms for 4,096 ids and a second for 131,072."""
    return library().LLTokenizer(table, eos_token=list(eos_ids))


def make_matcher(tokenizer: "llguidance.LLTokenizer", text: str) -> "llguidance.LLMatcher":
    """A matcher at the start of the output; `get_error` says why there is none. The GIL is free meanwhile."""
    llg = library()
    limits = llg.LLParserLimits(max_items_in_row=ROW_ITEMS, initial_lexer_fuel=INITIAL_FUEL, step_lexer_fuel=STEP_FUEL,
                                step_max_items=STEP_ITEMS, max_lexer_states=LEXER_STATES, verbose_errors=False)
    try:
        return llg.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    except BaseException as cause:
        if type(cause).__name__ == "PanicException":  # Rust's, and no Exception
            raise InvalidRequest(FIELD, "the grammar compiler failed on it; change it") from cause
        raise


def problem_of(matcher: "llguidance.LLMatcher") -> str:
    """The error of a matcher on one line; "" for none."""
    lines = (line.strip() for line in matcher.get_error().replace("<non-verbose/>", "").splitlines())
    return " ".join(line for line in lines if line)[:MAX_PROBLEM_CHARS]


def grammar_text(wanted: StructuredOutput) -> str:
    """The grammar of a checked StructuredOutput as llguidance's JSON."""
    return json.dumps({"grammars": [{"lark_grammar": HEADER}, {"name": "body", **_body(wanted)}]})


def _body(wanted: StructuredOutput) -> dict[str, Any]:
    if wanted.regex is not None:
        return {"lark_grammar": f"start: /{library().regex_to_lark(wanted.regex, use_ascii='')}/"}
    if wanted.choice is not None:
        # One terminal, since each alternative of a rule would be an item of the parser. Lark's strings are JSON's.
        return {"lark_grammar": f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, wanted.choice))}"}
    if wanted.grammar is not None:
        return {"lark_grammar": wanted.grammar}
    schema = json.loads(wanted.json) if isinstance(wanted.json, str) else {"type": "object"}
    space = {"whitespace_flexible": False} if wanted.disable_any_whitespace else {"whitespace_pattern": WHITESPACE}
    return {"json_schema": {**narrowed(schema), LIBRARY_OPTIONS: space}}
