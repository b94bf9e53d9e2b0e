"""The command line: mistakes answered in one line, and each command passes on what it was given."""

import argparse
import dataclasses
import inspect
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxinfer import cli, command_parser, doctor, loading, options, quick_bench
from jaxinfer.errors import OutOfMemory
from jaxinfer.outputs import CompletionOutput, Delta, RequestOutput
from jaxinfer.request_limits import RequestLimits
from jaxinfer.types import RequestStats, SamplingParams, StructuredOutput

ROOT = Path(__file__).resolve().parents[2]


class FakeLLM:
    """Answers every prompt with its own text in capitals, in pieces of four characters."""

    def __init__(self, model: str, **arguments):
        self.model, self.arguments, self.calls = model, arguments, []
        self.core = SimpleNamespace(info=SimpleNamespace(vocab_size=100))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.6, top_p=0.95)

    def generate(self, prompts, params, use_tqdm=True):
        self.calls.append((prompts, params))
        return [self.output(prompt) for prompt in prompts]

    def output(self, prompt) -> RequestOutput:
        text = prompt.upper() if isinstance(prompt, str) else ""
        stats = RequestStats(arrival=1.0, first_token=1.5, finished=2.5, num_prompt_tokens=4, num_output_tokens=3)
        sample = CompletionOutput(0, text, [1, 2, 3], finish_reason="length")
        return RequestOutput(
            "r", prompt if isinstance(prompt, str) else None, [1, 2, 3, 4], None, [sample], True, stats
        )

    def stream(self, prompt, params):
        self.calls.append((list(prompt), params))
        text = (prompt if isinstance(prompt, str) else prompt[-1]["content"]).upper()
        yield from (Delta("r", 0, text[start : start + 4]) for start in range(0, len(text), 4))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """The LLMs that a command makes, all fakes."""
    llms: list[FakeLLM] = []

    def make(model: str, **arguments):
        llms.append(FakeLLM(model, **arguments))
        return llms[-1]

    monkeypatch.setattr("jaxinfer.LLM", make, raising=False)
    return llms


# Help.



MISTAKES = [
    (["generate", "--max-token", "3", "x"], "unknown option --max-token; did you mean --max-tokens?"),
    (["serve", "--prot=1"], "unknown option --prot=1; did you mean --port?"),
    (["convert", "a", "b", "c"], "unexpected c"),
    (["serve", "a", "b"], "unexpected b"),
    (["serve", "--model", "a", "b"], "unexpected b"),
    (["genrate"], "unknown command 'genrate'; did you mean generate?"),
    (["xyzzy"], "unknown command 'xyzzy' ("),
    ([], "required: COMMAND"),
    (["generate", "--max-tokens", "many"], "'many' is not a whole number"),
    (["serve", "--port", "x"], "--port"),
    (["bench", "serve", "--request-rat", "3"], "unknown option --request-rat; did you mean --request-rate?"),
    (["bench", "serve", "demo"], "unexpected demo"),
    (["bench", "serve", "--request-rate", "fast"], "argument --request-rate: invalid float value: 'fast'"),
    (["convert", "a", "b", "--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda value: value if isinstance(value, str) else None
)
def test_a_mistake_is_answered_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == command_parser.EXIT_USAGE
    assert message in error and error.count("\n") == 1 and "--help" in error


WORDS = [
    (["generate", "m", "a", "b"], "m", ["a", "b"]),
    (["generate", "m", "--max-tokens", "5", "a"], "m", ["a"]),
    (["generate", "--max-tokens", "5", "m", "a"], "m", ["a"]),
    (["generate", "a", "--model", "m", "b"], "m", ["a", "b"]),
    (["serve", "--port", "1", "m"], "m", None),
    (["serve", "m", "--port", "1"], "m", None),
    (["serve", "--port", "1"], "demo", None),
    (["doctor", "--model", "m"], "m", None),
]


@pytest.mark.parametrize(("arguments", "model", "prompts"), WORDS, ids=str)
def test_words_may_stand_before_and_after_options(arguments, model, prompts, made, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("jaxinfer.doctor.examine", lambda model: seen.append(model) or doctor.Findings())
    monkeypatch.setattr("serve.server.serve", lambda make, config: seen.append(make() and made[0].model) or 0)
    assert cli.main(arguments) == 0
    if prompts is None:
        assert seen == [model]
    else:
        assert made[0].model == model
        assert capsys.readouterr().out.replace("--- ", "").lower().split()[-1] == prompts[-1]


@pytest.mark.parametrize(
    ("text", "value"),
    [("512", 512), ("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("2M", 2**21), ("1m", 10**6), ("1_000", 1000), ("0", 0)],
)
def test_count(text, value):
    assert options.count(text) == value


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5", "1.0001k", "1e3", "4G", "99999999999", "1 k", "1kb", "٣"])
def test_count_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
        options.count(text)


ERRORS = [
    (OutOfMemory("too little\n  table\n  of memory"), 1, "jaxinfer: too little table of memory\n"),
    (FileNotFoundError(2, "No such file", "x"), 1, "jaxinfer: [Errno 2] No such file: 'x'\n"),
    (KeyboardInterrupt(), 130, ""),
]


@pytest.mark.parametrize(("error", "code", "text"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_are_one_line_and_an_exit_code(monkeypatch, capsys, error, code, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("jaxinfer.LLM", fail, raising=False)
    assert cli.main(["generate", "x", "prompt"]) == code
    assert capsys.readouterr().err == text


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a defect")

    monkeypatch.setattr("jaxinfer.LLM", fail, raising=False)
    with pytest.raises(AssertionError):
        cli.main(["generate", "x", "prompt"])


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m jaxinfer.cli generate --help | head -n 1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "Traceback" not in result.stderr


# Commands.


def test_engine_options_are_those_of_llm():
    from jaxinfer.offline import LLM

    parameters = inspect.signature(LLM.__init__).parameters
    ours = {option.name for option in options.ENGINE_OPTIONS}
    assert ours | {"self", "model", "quiet", "block_size", "request_limits"} == set(parameters)
    computed = {"page_size": 16}  # None there, so that its alias can be told apart
    for option in options.ENGINE_OPTIONS:
        assert option.default == computed.get(option.name, parameters[option.name].default), option.name


def test_server_options_are_those_of_the_server():
    from serve.server_config import ServerConfig

    fields = {field.name: field.default for field in dataclasses.fields(ServerConfig)}
    assert {option.name: option.default for option in options.SERVER_OPTIONS} == fields


def test_sampling_options_are_fields():
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {option.name for option in options.SAMPLING_OPTIONS} <= names


def test_generate_streams_one_prompt(made, capsys):
    arguments = [
        "generate",
        "--model",
        "m",
        "--max-model-len",
        "1K",
        "--no-enable-prefix-caching",
        "--temperature",
        "0",
    ]
    assert cli.main([*arguments, "--stop", "a", "--stop", "b", "hello there"]) == 0
    assert capsys.readouterr().out == "HELLO THERE\n"
    assert made[0].model == "m"
    assert made[0].arguments == {"max_model_len": 1024, "enable_prefix_caching": False, "quiet": False}
    ((prompt, params),) = made[0].calls
    assert "".join(prompt) == "hello there"
    assert params == SamplingParams(temperature=0.0, top_p=0.95, max_tokens=128, stop=("a", "b"))


def test_penalties_and_bad_words_are_passed_on(made):
    options = ["--presence-penalty", "-0.5", "--repetition-penalty", "1.2", "--bad-words", "no", "--bad-words", "never"]
    assert cli.main(["generate", "m", "x", *options]) == 0
    ((_, params),) = made[0].calls
    assert (params.presence_penalty, params.repetition_penalty, params.bad_words) == (-0.5, 1.2, ("no", "never"))


SCHEMA = '{"type": "object", "required": ["b", "a"]}'
STRUCTURED = [
    (["--json-schema", "FILE"], SCHEMA, StructuredOutput(json='{"type":"object","required":["b","a"]}')),
    (["--regex", "[0-9]+"], "", StructuredOutput(regex="[0-9]+")),
    (["--choice", "yes", "--choice", "no"], "", StructuredOutput(choice=("yes", "no"))),
    (["--grammar", "FILE"], 'start: "ä"', StructuredOutput(grammar='start: "ä"')),
]


@pytest.mark.parametrize(("words", "text", "wanted"), STRUCTURED, ids=str)
def test_what_the_output_must_look_like(words, text, wanted, made, tmp_path):
    file = tmp_path / "file"
    file.write_text(text, encoding="utf-8")
    options = [str(file) if word == "FILE" else word for word in words]
    assert cli.main(["generate", "demo", "x", *options]) == 0
    ((_, params),) = made[0].calls
    assert params.structured_outputs == wanted


@pytest.mark.parametrize(("words", "message"), [
    (["--regex", "a", "--choice", "b"], "structured_outputs: must set exactly one of json, json_object, regex, choice"),
    (["--json-schema", "FILE"], "structured_outputs.json: is not valid JSON"),
    (["--json-schema", "nowhere.json"], "nowhere.json"),
    (["--grammar", "LATIN"], "is not UTF-8 text"),
    (["--regex", ""], "structured_outputs.regex: is empty"),
    (["--regex", "a", "--bad-words", "b"], "bad_words: cannot be used with structured_outputs"),
    (["--presence-penalty", "3"], "presence_penalty: must be"),
])  # fmt: skip
def test_what_no_model_could_take_is_refused_before_the_start(words, message, made, tmp_path, capsys):
    (tmp_path / "FILE").write_text("{", encoding="utf-8")
    (tmp_path / "LATIN").write_bytes("ä".encode("latin-1"))
    options = [str(tmp_path / word) if word in ("FILE", "LATIN") else word for word in words]
    assert cli.main(["generate", "m", "x", *options]) == (1 if "nowhere.json" in words else 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not made


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(("words", "message"), [
    (["--regex", "(a"], "structured_outputs.regex: cannot be compiled"),
    (["--grammar", "FILE"], "structured_outputs.grammar: cannot be compiled"),
])  # fmt: skip
def test_what_cannot_be_compiled_is_refused_before_the_start(command, words, message, made, tmp_path, capsys):
    (tmp_path / "FILE").write_text("start: [", encoding="utf-8")
    options = [str(tmp_path / word) if word == "FILE" else word for word in words]
    assert cli.main([command, "demo", *options, *(["x"] if command == "generate" else [])]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not made


def test_a_model_without_a_tokenizer_takes_no_grammar(made, tmp_path, capsys):
    (tmp_path / "config.json").write_text((loading.model_folder("demo") / "config.json").read_text())
    assert cli.main(["generate", str(tmp_path), "x", "--regex", "a"]) == 1
    assert "has no tokenizer" in capsys.readouterr().err and not made


def test_generate_prints_several_prompts_after_each_other(made, capsys):
    assert cli.main(["generate", "demo", "a", "b"]) == 0
    assert capsys.readouterr().out == "--- a\nA\n--- b\nB\n"


def test_generate_reads_standard_input_and_writes_json(made, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b"))
    assert cli.main(["generate", "--json", "--quiet"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["prompt"], line["text"], line["finish_reason"]) == ("a b", "A B", "length")
    assert made[0].arguments == {"quiet": True}


def test_chat_keeps_the_conversation_until_it_is_reset(made, capsys, monkeypatch):
    lines = iter(["hi", "", "again", "/reset", "new", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", "--system", "be brief"]) == 0
    assert capsys.readouterr().out == "HI\nAGAIN\nNEW\n"
    roles = [[message["role"] for message in prompt] for prompt, _ in made[0].calls]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]


def test_chat_ends_with_its_input(made, monkeypatch):
    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert cli.main(["chat"]) == 0


def test_serve_hands_over_a_core(made, monkeypatch):
    from serve import server

    seen = []

    def serve(core_factory, config):
        seen.append((core_factory(), config))
        return 1

    monkeypatch.setattr(server, "serve", serve)
    assert cli.main(["serve", "--port", "0", "--drain-seconds", "2", "--max-num-seqs", "8"]) == 1
    ((core, config),) = seen
    assert core is made[0].core and made[0].arguments["max_num_seqs"] == 8
    assert "request_limits" not in made[0].arguments
    assert config == server.ServerConfig(host="127.0.0.1", port=0, drain_seconds=2.0)
    assert cli.main(["serve", "--max-n", "4", "--template-seconds", "1"]) == 1
    assert made[1].arguments["request_limits"] == RequestLimits(max_n=4, template_seconds=1.0)


@pytest.mark.parametrize(
    ("option", "field"), [("--max-num-seqs", "max_num_seqs"), ("--gpu-memory-utilization", "gpu_memory_utilization")]
)
def test_serve_refuses_options_before_it_takes_a_port(option, field, monkeypatch, capsys):
    monkeypatch.setattr("serve.server.serve", lambda make, config: pytest.fail("it was started"))
    assert cli.main(["serve", "demo", option, "0"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(f"jaxinfer: {field}: must be ")


def test_convert_writes_a_folder_once(tmp_path, capsys):
    target = tmp_path / "converted"
    assert cli.main(["convert", "demo-draft", str(target), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    assert (target / "config.json").is_file() and (target / "tokenizer.json").is_file()
    assert cli.main(["convert", "demo-draft", str(target)]) == 1
    error = capsys.readouterr().err
    assert "exists already" in error and error.count("\n") == 1


def test_bench_measures(made, capsys):
    assert cli.main(["bench", "--num-prompts", "5", "--input-len", "4", "--output-len", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_prompt_tokens"], result["num_output_tokens"]) == (20, 15)
    assert result["ttft"] == [0.5] * 3 and result["itl"] == [0.5] * 3
    warm, (prompts, params) = made[0].calls
    assert warm[1].max_tokens == 1
    assert len(prompts) == 5 and all(len(prompt) == 4 for prompt in prompts) and params.ignore_eos
    assert "first token, ms" in quick_bench.summary(quick_bench.Load(1, 1, 1), 1.0, []).table()


def test_bench_serve_is_a_command_of_two_words(made, monkeypatch):
    from serve.bench import command
    from serve.bench.config import BenchConfig

    seen = []
    monkeypatch.setattr(command, "run", lambda config: seen.append(config) or 0)
    words = ["--dataset", "random", "--input-len", "9", "--goodput", "ttft:1", "tpot:2", "--request-rate", "inf"]
    assert cli.main(["bench", "serve", *words, "--ignore-eos"]) == 0
    assert seen == [BenchConfig(dataset_name="random", random_input_len=9, goodput=["ttft:1", "tpot:2"],
                                ignore_eos=True)]  # fmt: skip
    assert not made
    assert cli.main(["bench", "./serve", "--num-prompts", "1"]) == 0 and made[0].model == "./serve"


def test_bench_refuses_nothing_to_do(made, capsys):
    assert cli.main(["bench", "--num-prompts", "0"]) == 2
    assert capsys.readouterr().err == "jaxinfer: num_prompts: must be at least 1, got 0\n"
