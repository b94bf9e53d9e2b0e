"""Rows with a grammar in the real engine, beside rows without: output is always legal, others are not touched by it."""

import json
import re
from functools import cache
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from benchmarks.json_schemas import schemas
from jaxinfer import LLM, InvalidRequest, SamplingParams, StructuredOutput, startup
from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.errors import GrammarFailed
from jaxinfer.grammar_matcher import Matcher

PEOPLE = {
    "type": "object", "additionalProperties": False, "required": ["name", "age"],
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
                   "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
}  # fmt: skip
NUMBER = r"[0-9]{3}-[0-9]{4}"


@pytest.fixture(scope="module")
def llms():
    """Alone and with drafters, each compiled once. Few pages, so that rows are preempted. As much is drafted as may be.
    """
    made: list[LLM] = []

    @cache
    def llm(speculation: str | None) -> LLM:
        draft_model = "demo-draft" if speculation == "draft_model" else None
        with mock.patch.object(startup, "measured_drafts", lambda executor, config, say: DraftLengths.of(config)):
            made.append(LLM("demo-draft", draft_model=draft_model, speculation=speculation, dtype="float32",
                            num_speculative_tokens=3, max_num_seqs=2, max_model_len=256, num_pages=16,
                            max_num_batched_tokens=64, quiet=True))  # fmt: skip
        # What the first grammar needs is being made already.
        assert made[-1].core.intake._grammars._pool is not None
        return made[-1]

    yield llm
    for one in made:
        one.close()


@pytest.fixture(params=[None, "draft_model"])
def llm(request, llms) -> LLM:
    return llms(request.param)


def answers(llm: LLM, params: list[SamplingParams]) -> list[str]:
    """To one prompt; a row that is greedy or has a seed answers the same wherever it stands."""
    return [one.outputs[0].text for one in llm.generate(["def number("] * len(params), params, use_tqdm=False)]


def test_each_row_follows_its_own_grammar_and_others_are_not_touched(llm):
    free = [SamplingParams(temperature=0.0, max_tokens=24),
            SamplingParams(temperature=1.0, seed=7, max_tokens=24, frequency_penalty=0.5)]  # fmt: skip
    kinds = [StructuredOutput(json=PEOPLE), StructuredOutput(regex=NUMBER), StructuredOutput(choice=("yes", "no")),
             StructuredOutput(grammar='start: ("a" | "bc")~3'), StructuredOutput(json_object=True)]  # fmt: skip
    bound = [SamplingParams(temperature=1.0, seed=index, max_tokens=150, structured_outputs=kind, logit_bias={5: -3.0})
             for index, kind in enumerate(kinds)]  # fmt: skip
    alone = answers(llm, free)
    texts = answers(llm, [bound[0], free[0], *bound[1:3], free[1], *bound[3:]])
    person, first, number, choice, second, letters, anything = texts
    assert [first, second] == alone
    Draft202012Validator(PEOPLE).validate(json.loads(person))
    assert re.fullmatch(NUMBER, number)
    assert choice in ("yes", "no")
    assert re.fullmatch("(a|bc){3}", letters)
    assert anything.lstrip().startswith("{")
    assert llm.metrics()["compiles_after_ready"] == 0


def test_drafting_changes_nothing(llms):
    """Proposals are made for rows with a grammar too, illegal ones among them, and some are kept. An output that its
    grammar closes has no end-of-sequence behind it, though a round may have brought one.
    """
    kinds = [StructuredOutput(json=PEOPLE), StructuredOutput(regex=r"(ab|ba|0[0-9]){8,20}"),
             StructuredOutput(regex="[a-z]{1,9}x*"), StructuredOutput(choice=("aaaaaaaa",)), None]  # fmt: skip
    params = [SamplingParams(temperature=temperature, seed=5, max_tokens=60, structured_outputs=kind, logprobs=1,
                             presence_penalty=temperature / 2) for kind in kinds for temperature in (0.0, 0.8)]
    drafting, prompts = llms("draft_model"), ["def number("] * len(params)
    before = drafting.metrics()
    found, wanted = (one.generate(prompts, params, use_tqdm=False) for one in (drafting, llms(None)))
    for one, other in zip(found, wanted, strict=True):
        (one,), (other,) = one.outputs, other.outputs
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        assert len(one.logprobs) == len(one.token_ids)
    after = drafting.metrics()
    made, kept = (after[name] - before[name] for name in ("draft_tokens", "accepted_tokens"))
    assert 0 < kept < made


@pytest.mark.parametrize("fail_at", range(5))
def test_a_step_that_fails_between_its_halves_loses_nothing(llm, fail_at):
    """What was committed before is told, and every row goes on from its tokens."""
    params = [SamplingParams(temperature=0.0, max_tokens=4 + index, structured_outputs=kind) for index, kind in
              enumerate([None, StructuredOutput(regex="[0-9]{9,}"), None])]  # fmt: skip
    wanted = answers(llm, params)
    counts = iter(range(10**6))

    def breaking(engine):
        sample = engine.runner.sample

        def failing(step, masks):
            if next(counts) == fail_at:
                raise RuntimeError("injected")
            sample(step, masks)

        engine.runner.sample = failing

    llm.core.engine.run(breaking)
    try:
        assert answers(llm, params) == wanted
        assert next(counts) > fail_at
    finally:
        llm.core.engine.run(lambda engine: delattr(engine.runner, "sample"))
        llm.core.engine.run(lambda engine: engine._failures.clear())


def test_a_grammar_that_fails_at_work_ends_its_sample_alone(llms, monkeypatch):
    advance = Matcher.advance

    def failing(self, tokens):
        if self.grammar.kind == "regex" and self.num_tokens == 2:
            raise GrammarFailed("structured_outputs.regex", "broke a limit")
        advance(self, tokens)

    monkeypatch.setattr(Matcher, "advance", failing)
    kinds = [StructuredOutput(regex="[0-9]{9}"), StructuredOutput(choice=("one", "two")), None]
    params = [SamplingParams(temperature=0.0, max_tokens=9, structured_outputs=kind) for kind in kinds]
    first, *others = llms(None).generate(["def number("] * 3, params, use_tqdm=False)
    assert first.outputs[0].finish_reason == "error"
    assert {one.outputs[0].finish_reason for one in others} <= {"stop", "length"}


def test_preempted_rows_and_samples_go_on_where_they_were(llm):
    """Two rows of up to fourteen pages at once, where sixteen are all there are."""
    params = [SamplingParams(temperature=1.0, seed=index, max_tokens=220, n=3, logprobs=1,
                             structured_outputs=StructuredOutput(regex=r"([0-9]{2},){40,70}")) for index in range(4)]
    before = llm.metrics()["preemptions"]
    prompts = [f"x = [{index}, " for index in range(4)]
    found = llm.generate(prompts, params, use_tqdm=False)
    assert llm.metrics()["preemptions"] > before
    for one in found:
        assert len({sample.text for sample in one.outputs}) == 3
        for sample in one.outputs:
            assert sample.finish_reason in ("stop", "length")
            assert re.fullmatch(r"([0-9]{2},){40,70}" if sample.finish_reason == "stop" else r"[0-9,]+", sample.text)
            assert len(sample.logprobs) == len(sample.token_ids)


def test_a_grammar_decides_where_the_output_ends(llm):
    """Where nothing may follow the row ends at once; where more may, it is the model that says so."""
    (one,) = llm.generate("a", SamplingParams(temperature=0.0, max_tokens=20, structured_outputs=StructuredOutput(
        choice=("only this",))), use_tqdm=False)  # fmt: skip
    assert (one.outputs[0].text, one.outputs[0].finish_reason) == ("only this", "stop")
    open_ended = SamplingParams(temperature=1.0, seed=1, max_tokens=20, structured_outputs=StructuredOutput(regex="x*"))
    (one,) = llm.generate("a", open_ended, use_tqdm=False)
    assert set(one.outputs[0].text) <= {"x"}


@pytest.mark.parametrize("other", [
    {"allowed_token_ids": [5]}, {"banned_token_ids": [5]}, {"bad_words": ["no"]}, {"min_tokens": 2},
])  # fmt: skip
def test_what_may_leave_no_legal_token_is_refused(llms, other):
    params = SamplingParams(structured_outputs=StructuredOutput(regex="a+"), **other)
    with pytest.raises(InvalidRequest, match="structured_outputs") as caught:
        llms(None).generate("x", params, use_tqdm=False)
    assert caught.value.field == next(iter(other))


def test_a_bad_grammar_fails_its_request_alone(llms):
    llm, good = llms(None), SamplingParams(temperature=0.0, max_tokens=5)
    bad = SamplingParams(structured_outputs=StructuredOutput(regex="(a"))
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.regex"):
        llm.generate(["x", "y"], [good, bad], use_tqdm=False)
    assert answers(llm, [good])[0]


@settings(max_examples=8)
@given(wanted=st.lists(schemas(), min_size=16, max_size=16))
def test_random_schemas_give_valid_json_or_a_typed_refusal(llms, wanted):
    """`python -m benchmarks.bench_schemas` has a thousand of them."""
    kept, params, matchers = [], [], []
    for seed, schema in enumerate(wanted):
        asked = SamplingParams(temperature=1.0, seed=seed, max_tokens=150,
                               structured_outputs=StructuredOutput(json=schema))  # fmt: skip
        try:
            grammar = llms(None).core.intake.request("value = ", asked).grammar
        except InvalidRequest as error:
            assert error.field.startswith("structured_outputs")
        else:
            kept.append(schema)
            matchers.append(grammar.matcher())
            params.append(asked)
    outputs = llms(None).generate(["value = "] * len(params), params, use_tqdm=False)
    for schema, matcher, one in zip(kept, matchers, outputs, strict=True):
        said = one.outputs[0]
        if said.finish_reason == "stop":
            Draft202012Validator(schema).validate(json.loads(said.text))
        else:  # cut: the beginning of something legal
            assert said.finish_reason == "length" and len(said.token_ids) == 150
            assert matcher.advance_to_end(said.token_ids) == 150
    assert 3 * sum(one.outputs[0].finish_reason == "stop" for one in outputs) >= len(outputs)
