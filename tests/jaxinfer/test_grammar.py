"""Constrained output on the host: random outputs against reference validators, masks against brute force."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from grammar_walks import legal, walk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.json_schemas import UNSUPPORTED, schemas
from jaxinfer import grammar_matcher
from jaxinfer.errors import GrammarFailed, InvalidRequest, status_of
from jaxinfer.grammar import Grammars
from jaxinfer.grammar_masks import MaskFiller
from jaxinfer.grammar_matcher import allows
from jaxinfer.grammar_vocabulary import bits_of, ids_of
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import StructuredOutput, mask_width

V = 4096 + 37
"""V of a model whose logits are wider than its tokenizer."""
W = mask_width(V)
RECORD = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}
SUM = """
start: sum
?sum: product | sum ("+" | "-") product
product: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""


@pytest.fixture(scope="module")
def matcher(grammars):
    return lambda **wanted: grammars.compile(StructuredOutput(**wanted)).matcher()


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


# Outputs against references.


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_outputs_satisfy_random_schemas_or_the_schema_is_refused(grammars, schema, seed):
    try:
        matcher = grammars.compile(StructuredOutput(json=schema)).matcher()
    except InvalidRequest as error:
        assert error.field == "structured_outputs.json"
        return
    found = walk(matcher, random.Random(seed))
    assert found is not None
    jsonschema.Draft202012Validator(schema).validate(json.loads(found))


@pytest.mark.parametrize("schema", UNSUPPORTED, ids="-".join)
def test_unsupported_keywords_are_refused(grammars, schema):
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.json: cannot be compiled"):
        grammars.compile(StructuredOutput(json=schema))


@pytest.mark.parametrize("seed", range(5))
def test_any_object_is_json(matcher, seed):
    assert isinstance(json.loads(walk(matcher(json_object=True), random.Random(seed)) or b""), dict)


@pytest.mark.parametrize("seed", range(5))
def test_json_without_white_space(matcher, seed):
    found = walk(matcher(json=RECORD, disable_any_whitespace=True), random.Random(seed))
    assert json.dumps(json.loads(found or b""), separators=(",", ":")).count(":") >= 2
    assert re.fullmatch(rb'\{"name":"(?:[^"\\]|\\.)*","age":-?[0-9]+\}', found or b"")


@pytest.mark.parametrize("indent", [None, 2, 4, "\t"])
def test_json_as_it_is_usually_written_is_legal(matcher, tokenizer, indent):
    text = json.dumps({"name": "x", "age": 3}, indent=indent)
    assert matcher(json=RECORD).valid_prefix(ids(tokenizer, text)) == len(ids(tokenizer, text))


def test_white_space_cannot_go_on_forever(matcher, tokenizer):
    one = matcher(json=RECORD)
    one.advance(ids(tokenizer, '{ '))
    assert all(tokenizer.token_bytes(id).lstrip() for id in legal(one))


PATTERNS = ["[a-z]{3}-[0-9]{2}", "(yes|no)( (yes|no)){0,3}", "a/b\\\\c\\nd?", "[^x]{1,6}", "[äöü日😀]+!", "é*(ab)+",
            "."]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_match_the_expression_and_end_only_there(matcher, tokenizer, pattern):
    """At every token: an end is legal exactly where `re` says that the text matches."""
    for seed in range(3):
        rng, one, text = random.Random(seed), matcher(regex=pattern), b""
        for _ in range(30):
            legal_ids = legal(one)
            complete = _matches(pattern, text)
            assert (tokenizer.eos_id in legal_ids) == one.is_complete == complete
            assert one.is_finished == (legal_ids == [tokenizer.eos_id])
            if one.is_finished:
                break
            id = rng.choice([id for id in legal_ids if id != tokenizer.eos_id])
            one.advance([id])
            text += tokenizer.token_bytes(id)


def _matches(pattern: str, text: bytes) -> bool:
    try:
        return re.fullmatch(pattern, text.decode()) is not None
    except UnicodeDecodeError:
        return False


CHOICES = ["yes", "yes, of course", "no", 'a "b"\\\n\x7f\t', "größer", "😀", "#// %x", "\u2028"]


@pytest.mark.parametrize("seed", range(8))
def test_masks_of_choices_are_exactly_the_tokens_that_lead_to_one(matcher, tokenizer, seed):
    rng, one, text = random.Random(seed), matcher(choice=CHOICES), b""
    wanted = [choice.encode() for choice in CHOICES]
    while True:
        legal_ids = legal(one)
        leading = [id for id in range(tokenizer.vocab_size) if id != tokenizer.eos_id and tokenizer.token_bytes(id)
                   and any(choice.startswith(text + tokenizer.token_bytes(id)) for choice in wanted)]
        assert sorted(legal_ids) == sorted(leading + [tokenizer.eos_id] * (text in wanted))
        id = rng.choice(legal_ids)
        one.advance([id])
        if id == tokenizer.eos_id:
            break
        text += tokenizer.token_bytes(id)
    assert text.decode() in CHOICES


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(choices=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), min_size=1, max_size=4))
def test_any_text_can_be_a_choice(grammars, tokenizer, choices):
    compiled = grammars.compile(StructuredOutput(choice=choices))
    for choice in choices:
        one = compiled.matcher()
        one.advance([id for byte in choice.encode() for id in [_byte_id(tokenizer, byte)]])
        assert one.is_complete


def _byte_id(tokenizer: Tokenizer, byte: int) -> int:
    return next(id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == bytes([byte]))


@pytest.mark.parametrize("seed", range(5))
def test_outputs_of_a_lark_grammar(matcher, seed):
    found = (walk(matcher(grammar=SUM), random.Random(seed), num_free=20) or b"").decode()
    assert re.fullmatch("[-+()0-9]+", found)
    eval(re.sub(r"\b0+(?=\d)", "", found))  # noqa: S307 (digits, signs and brackets)


# Matchers.


def place(matcher):
    return legal(matcher), matcher.is_complete, matcher.is_finished, matcher.num_tokens


def test_an_end_is_final_and_can_be_taken_back(matcher, tokenizer):
    one, eos = matcher(regex="ab*"), tokenizer.eos_id
    with pytest.raises(GrammarFailed, match="not legal after 0 tokens"):
        one.advance([eos])
    one.advance(ids(tokenizer, "a"))
    before = place(one)
    one.advance([eos, eos])
    assert place(one) == ([eos], True, True, 3)
    assert one.valid_prefix([eos]) == 1 and one.valid_prefix(ids(tokenizer, "b")) == 0
    with pytest.raises(GrammarFailed):
        one.advance(ids(tokenizer, "b"))
    one.rollback(2)
    assert place(one) == before
    one.rollback(1)
    assert (one.num_tokens, one.is_complete) == (0, False)
    with pytest.raises(ValueError, match="cannot take back 1 of 0"):
        one.rollback(1)


def test_rollback_also_from_where_nothing_may_follow(matcher, tokenizer):
    one = matcher(regex="abc")
    start = place(one)
    one.advance(ids(tokenizer, "abc"))
    assert one.is_finished
    one.advance([tokenizer.eos_id])
    one.rollback(one.num_tokens)
    assert place(one) == start


def test_an_illegal_token_fails_and_those_before_are_taken(matcher, tokenizer):
    one = matcher(regex="abc")
    a, b = ids(tokenizer, "a"), ids(tokenizer, "b")
    for bad in (a, [V - 1], [V + 1], [10**9], [-1]):
        fresh = matcher(regex="abc")
        with pytest.raises(GrammarFailed, match="is not legal after 1 tokens") as caught:
            fresh.advance([*a, *bad])
        assert fresh.num_tokens == 1 and allows(bits_of(legal(fresh), V), b[0])
        assert status_of(caught.value)[:2] == ("INVALID_ARGUMENT", 400)
    one.advance(a)


def random_place(matcher, rng):
    for _ in range(rng.randrange(12)):
        if matcher.is_finished:
            return
        matcher.advance([rng.choice(legal(matcher))])


def random_proposal(matcher, rng, tokenizer, size):
    """Legal tokens, often an end where it is legal, then perhaps any."""
    ahead, found = matcher.copy(), []
    for _ in range(size):
        id = rng.choice(legal(ahead)) if rng.random() < 0.8 else rng.randrange(tokenizer.vocab_size)
        id = tokenizer.eos_id if ahead.is_complete and rng.random() < 0.3 else id
        found.append(id)
        if not allows(bits_of(legal(ahead), V), id):
            return found + [rng.randrange(V) for _ in range(size - len(found))]
        ahead.advance([id])
    return found


WANTED = [StructuredOutput(json=RECORD), StructuredOutput(regex="(ab|c)*d?"), StructuredOutput(choice=CHOICES),
          StructuredOutput(grammar=SUM), StructuredOutput(grammar='start: "a" <[0-9]>* "b"')]


@pytest.mark.parametrize("seed", range(6))
def test_masks_along_proposals_are_those_of_a_row_that_took_them(grammars, tokenizer, seed):
    """One row alone, all rows at once, and the definition: the mask after each legal token."""
    rng, num_drafted = random.Random(seed), 4
    matchers = [grammars.compile(wanted).matcher() for wanted in WANTED * 2]
    for one in matchers:
        random_place(one, rng)
    proposals = [random_proposal(one, rng, tokenizer, rng.randrange(num_drafted + 1)) for one in matchers]
    before = [place(one) for one in matchers]
    out = np.zeros((len(matchers), num_drafted + 1, W), np.int32)
    assert MaskFiller(2).fill(matchers, out, proposals) == {}
    for row, (one, proposed) in enumerate(zip(matchers, proposals, strict=True)):
        expected, num_legal = along(one.copy(), proposed, num_drafted + 1)
        assert (out[row].view(np.uint32) == expected).all()
        alone = np.zeros((num_drafted + 1, W), np.uint32)
        assert one.fill_masks_along(proposed, alone) == num_legal == one.valid_prefix(proposed)
        assert (alone == expected).all()
        assert place(one) == before[row]


def along(matcher, proposed, num_masks):
    """The masks by definition, from a matcher that may be used up."""
    masks, num_legal = np.full((num_masks, W), 2**32 - 1, np.uint32), 0
    for id in [*proposed, None]:
        matcher.fill_mask(masks[num_legal])
        if id is None or not allows(masks[num_legal], id):
            break
        matcher.advance([id])
        num_legal += 1
        if id in matcher.grammar.vocabulary.eos_ids:
            break
    return masks, num_legal


def test_copies_go_their_own_ways(matcher, tokenizer):
    one = matcher(regex="(a|b)*c")
    one.advance(ids(tokenizer, "a"))
    other = one.copy()
    other.advance(ids(tokenizer, "c"))
    assert other.is_finished and not one.is_finished and (one.num_tokens, other.num_tokens) == (1, 2)


def test_rows_without_a_grammar_may_say_anything(matcher):
    out = np.zeros((3, W), np.uint32)
    MaskFiller(2).fill([None, matcher(regex="a"), None], out)
    assert (out[[0, 2]] == 2**32 - 1).all() and ids_of(out[1]).size == 1


@pytest.mark.parametrize(("shape", "dtype", "proposals"), [
    ((2, W + 1), np.uint32, None), ((2, W), np.uint64, None), ((1, W), np.uint32, None),
    ((2, 2, W), np.int32, [[1], [1, 2]]), ((2, 3, W), np.int32, [[1]]), ((2, W), np.int32, [[], []]),
])  # fmt: skip
def test_masks_that_do_not_fit_are_refused(matcher, shape, dtype, proposals):
    with pytest.raises(ValueError, match="do not fit into"):
        MaskFiller(2).fill([matcher(regex="a"), matcher(regex="b")], np.zeros(shape, dtype), proposals)
    with pytest.raises(ValueError, match="a mask is contiguous"):
        matcher(regex="a").fill_mask(np.zeros(W - 1, np.uint32))
    with pytest.raises(ValueError, match="do not fit into"):
        MaskFiller(2).fill([matcher(regex="a")], np.zeros((1, 2 * W), np.uint32)[:, ::2])


# Vocabularies.


def test_ids_that_spell_nothing_are_never_legal_nor_ends_before_the_end(matcher, tokenizer):
    """Not even where a grammar names all ids there are."""
    one = matcher(grammar='start: "a" <[*]> "b"')
    one.advance(ids(tokenizer, "a"))
    found = legal(one)
    assert tokenizer.eos_id not in found and len(found) > 4000 and max(found) < tokenizer.vocab_size
    for bad in (tokenizer.eos_id, tokenizer.vocab_size):
        assert one.copy().valid_prefix([bad]) == 0
        with pytest.raises(GrammarFailed):
            one.copy().advance([bad])
    anything = matcher(regex="(.|\\n)*")
    assert max(legal(anything)) < tokenizer.vocab_size and tokenizer.eos_id in legal(anything)


def test_a_row_whose_grammar_leaves_no_token_fails(matcher, tokenizer):
    one = matcher(grammar=f'start: "a" <[{tokenizer.eos_id}]> "b"')
    one.advance(ids(tokenizer, "a"))
    out = np.zeros((2, W), np.uint32)
    failed = MaskFiller(2).fill([one, matcher(regex="x")], out)
    assert list(failed) == [0] and "no token may follow" in str(failed[0])
    assert (out[0] == 2**32 - 1).all() and ids_of(out[1]).size == 1


def test_byte_fallback_vocabularies(grammars):
    from test_tokenizer import TOKENIZERS

    tokenizer = TOKENIZERS["byte fallback"]
    eos = tokenizer.vocab_size - 1
    small = Grammars(tokenizer, tokenizer.vocab_size, [eos])
    try:
        compiled = small.compile(StructuredOutput(json={"type": "string", "minLength": 1, "maxLength": 8}))
        for seed in range(5):
            found = walk(compiled.matcher(), random.Random(seed))
            assert 1 <= len(json.loads(found or b"")) <= 8
        one = small.compile(StructuredOutput(choice=["日本 größer"])).matcher()
        one.advance(tokenizer.encode("日本 größer", add_special_tokens=False))
        assert one.is_finished
    finally:
        small.close()


@pytest.mark.parametrize("kind", ["word piece", "metaspace", "none", "no end"])
def test_models_that_cannot_do_grammars_refuse(tokenizer, kind):
    from test_tokenizer import TOKENIZERS

    found = {"none": None, "no end": tokenizer}.get(kind, TOKENIZERS.get(kind))
    with pytest.raises(InvalidRequest, match="leave it out"):
        Grammars(found, 4096, [] if kind == "no end" else [0]).compile(StructuredOutput(regex="a"))


def test_a_row_that_takes_too_much_of_the_engines_time_ends(matcher, tokenizer):
    """A small grammar whose places are each within the parser's limits, and cost more with every token."""
    row, (token,) = matcher(grammar='start: e\ne: e e | "a" | "b" | ""'), ids(tokenizer, "a")
    with pytest.raises(GrammarFailed, match=r"took 0\.1 s more than 0\.5 ms each"):
        for _ in range(2000):
            assert row.advance_to_end([token]) == 1
    assert row.num_tokens > 20


def test_time_that_was_not_used_is_not_saved_up(matcher, tokenizer, monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 1.05, 2.0, 2.06]).__next__
    row, (token,) = matcher(regex="a*"), ids(tokenizer, "a")
    monkeypatch.setattr(grammar_matcher.time, "thread_time", clock)
    for _ in range(2):
        row.advance_to_end([token])
    with pytest.raises(GrammarFailed):
        row.advance_to_end([token])
