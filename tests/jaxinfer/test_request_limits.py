"""Every flag for what a request may ask: its default, and its value at the limit, one below and one beyond."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counting_engine import EOS, VOCAB_SIZE, byte_tokenizer, write_tokenizer

from jaxinfer import cli, options, startup
from jaxinfer.chat_template import ChatTemplate, render_bounds
from jaxinfer.errors import InvalidConfig, InvalidRequest
from jaxinfer.intake import GenerationDefaults, Intake
from jaxinfer.request_limits import DEFAULT_LIMITS, MOST_SECONDS, RANGES, RequestLimits
from jaxinfer.start_options import Options
from jaxinfer.types import SamplingParams, StructuredOutput
from jaxinfer.validation import Limits

TEMPLATE = "{{ messages[0].content }}"


def limits_of(*flags: str) -> RequestLimits:
    """As `jaxinfer serve` reads them."""
    return options.given_limits(cli.make_parser().parse_args(["serve", *flags])).get("request_limits", DEFAULT_LIMITS)


def intake_of(limits: RequestLimits, template: str = TEMPLATE) -> Intake:
    return Intake(byte_tokenizer(), Limits(vocab_size=VOCAB_SIZE, max_model_len=4096, request=limits),
                  GenerationDefaults(SamplingParams(), (EOS,)),
                  chat_template=ChatTemplate(template, bounds=render_bounds(limits)))


def shape(**kind: Any) -> dict[str, Any]:
    return {"structured_outputs": StructuredOutput(**kind)}


def schema_of(size: int) -> dict[str, str]:
    return {"const": "x" * (size - len(json.dumps({"const": ""}, separators=(",", ":"))))}


FIELDS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "max_n": ("n", lambda size: {"n": size}),
    "max_stops": ("stop", lambda size: {"stop": ["s"] * size}),
    "max_stop_bytes": ("stop", lambda size: {"stop": "ä" * (size // 2) + "s" * (size % 2)}),
    "max_logprobs": ("logprobs", lambda size: {"logprobs": size}),
    "max_logit_bias": ("logit_bias", lambda size: {"logit_bias": dict.fromkeys(range(size), 1.0)}),
    "max_bad_words": ("bad_words", lambda size: {"bad_words": ["w"] * size}),
    "max_schema_bytes": ("structured_outputs.json", lambda size: shape(json=schema_of(size))),
    "max_grammar_bytes": ("structured_outputs.grammar",
                          lambda size: shape(grammar="start: /a/".ljust(size) if size >= 10 else "x" * size)),
    "max_regex_bytes": ("structured_outputs.regex", lambda size: shape(regex="a" * size)),
    "max_choices": ("structured_outputs.choice", lambda size: shape(choice=[f"c{one}" for one in range(size)])),
}
"""The field that a flag bounds, and a request that takes up as much of it."""
LEAST = {"max_schema_bytes": 16, "max_grammar_bytes": 16}


def test_the_flags_are_the_limits():
    fields = {field.name: field.default for field in dataclasses.fields(RequestLimits)}
    assert {option.name: option.default for option in options.LIMIT_OPTIONS} == fields
    assert limits_of() is DEFAULT_LIMITS
    assert set(FIELDS) | {"max_template_bytes", "grammar_seconds", "template_seconds"} == set(fields)


def test_the_help_tells_every_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in options.LIMIT_OPTIONS:
        flag = f"--{option.name.replace('_', '-')}"
        assert f"(default: {option.default})" in shown.partition(f"{flag} ")[2].partition(" --")[0], flag


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_moves_its_limit(name: str):
    """Below and above its default: what it allows is taken, one more is refused, and names field and limit."""
    field, ask = FIELDS[name]
    default, (_, most) = getattr(DEFAULT_LIMITS, name), RANGES[name]
    for limit in {LEAST.get(name, 3), min(2 * default, most, VOCAB_SIZE - 1 if name == "max_logit_bias" else most)}:
        intake = intake_of(limits_of(f"--{name.replace('_', '-')}", str(limit)))
        try:
            for size in (limit - 1, limit):
                assert intake.request([1], SamplingParams(max_tokens=4, **ask(size))).prompt == (1,)
            if limit < most:
                with pytest.raises(InvalidRequest, match=rf"\b{limit}\b") as caught:
                    intake.request([1], SamplingParams(max_tokens=4, **ask(limit + 1)))
                assert caught.value.field == field
        finally:
            intake.close()


def test_prompt_logprobs_have_the_limit_of_logprobs():
    intake = intake_of(limits_of("--max-logprobs", "2"))
    assert intake.request([1, 2], SamplingParams(max_tokens=1, prompt_logprobs=2))
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        intake.request([1, 2], SamplingParams(max_tokens=1, prompt_logprobs=3))


def test_a_rendered_chat():
    intake = intake_of(limits_of("--max-template-bytes", "100"))
    try:
        for size in (99, 100):
            assert len(intake.chat([{"role": "user", "content": "x" * size}]).ids) == size
        with pytest.raises(InvalidRequest, match="its output is over 100 bytes"):
            intake.chat([{"role": "user", "content": "x" * 101}])
    finally:
        intake.close()


def test_the_time_of_a_render():
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    intake = intake_of(limits_of("--template-seconds", "0.2"), template=endless)
    try:
        with pytest.raises(InvalidRequest, match=r"broke its limits \(0\.2 s"):
            intake.chat([{"role": "user", "content": "x"}])
    finally:
        intake.close()


def test_a_start_hands_the_bounds_of_a_render_on(tmp_path: Path):
    chosen = Options(model="any", tokenizer=str(write_tokenizer(tmp_path)),
                     request_limits=limits_of("--max-template-bytes", "3"))
    _, template = startup.read_text_files(chosen, tmp_path)
    assert template is not None
    try:
        assert template.render([{"role": "user", "content": "abc"}]) == "abc"
        with pytest.raises(InvalidRequest, match="its output is over 3 bytes"):
            template.render([{"role": "user", "content": "abcd"}])
    finally:
        template.close()


def test_the_time_of_a_grammar():
    slow = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{one}}}"} for one in range(5, 25)]}
    intake = intake_of(limits_of("--grammar-seconds", "0.3"))
    try:
        intake.start_grammars()
        with pytest.raises(InvalidRequest, match=r"broke the limits \(0\.3 s"):
            intake.request([1], SamplingParams(max_tokens=4, **shape(json=slow)))
    finally:
        intake.close()


@pytest.mark.parametrize("name", RANGES)
def test_a_limit_has_limits_itself(name: str):
    least, most = RANGES[name]
    for value in (least, most):
        assert getattr(RequestLimits(**{name: value}), name) == value
    for value in (least - 1, most + 1, 3.0, True, "3"):
        with pytest.raises(InvalidConfig, match=rf"{name}: must be an integer in \[{least}, {most}\]"):
            RequestLimits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["grammar_seconds", "template_seconds"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), MOST_SECONDS + 1, "2"])
def test_seconds_have_limits_too(name: str, value: Any):
    with pytest.raises(InvalidConfig, match=f"{name}: must be over 0 and at most 20"):
        RequestLimits(**{name: value})


def test_a_wrong_flag_is_one_line_before_a_port_is_taken(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("serve.server.serve", lambda make, config: pytest.fail("it was started"))
    assert cli.main(["serve", "--max-logprobs", "21"]) == 2
    assert capsys.readouterr().err == "jaxinfer: max_logprobs: must be an integer in [0, 20], got 21\n"
