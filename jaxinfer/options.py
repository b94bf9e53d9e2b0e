"""Options of the command line that are passed on under their own names, and how their values are read. No jax here."""

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jaxinfer.errors import InvalidRequest

SIZES = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2, "g": 1000**3, "G": 1024**3}
MOST_COUNT = 2**31 - 1
"""Sizes become i32 on the device."""


def count(text: str) -> int:
    """A whole number, also as 4k (4,000) or 4K (4,096)."""
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)([kKmMgG]?)", text)
    value = float(match[1].replace("_", "")) * SIZES[match[2]] if match else -1.0
    if not match or value != int(value) or value > MOST_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 512, 4k (4,000) or 4K (4,096)")
    return int(value)


def file(text: str) -> str:
    """The name of a file, which is read later."""
    return text


@dataclass(frozen=True, slots=True)
class Option:
    """One option, passed on under its own name when given. default: what its receiver takes otherwise, for the help."""

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str

    def add_to(self, parser: argparse._ActionsContainer, *also: str) -> None:
        """also: other spellings of the flag."""
        flags = (f"--{self.name.replace('_', '-')}", *also)
        shown = "" if self.default is None else f" (default: {self.default})"
        if self.type is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, default=None, help=f"{self.help}{shown}")
        else:
            names = {count: "N", int: "N", float: "X", str: "TEXT", file: "FILE"}
            parser.add_argument(*flags, type=self.type, metavar=names[self.type], help=f"{self.help}{shown}")


ENGINE_OPTIONS = (
    Option("tokenizer", str, None, "folder to take the tokenizer from (default: the model's)"),
    Option("dtype", str, "auto", "auto (the checkpoint's), bfloat16 or float32"),
    Option("quantization", str, None, "int8 (weights and activations) or int8_weight_only (default: as stored)"),
    Option("kv_cache_dtype", str, "auto", "of the pages: auto (that of the activations), bfloat16, float32, int8, fp8"),
    Option("max_model_len", count, None, "longest prompt + output in tokens (default: the model's, at most 32,768)"),
    Option("max_num_seqs", count, 64, "rows that run at once"),
    Option("max_num_batched_tokens", count, 2048, "token budget of one step"),
    Option("page_size", count, 16, "tokens a page of the KV cache"),
    Option("num_pages", count, None, "pages in the pool (default: what memory allows)"),
    Option("gpu_memory_utilization", float, 0.9, "share of the accelerator's memory to use"),
    Option("tensor_parallel_size", count, 1, "devices the model is cut over"),
    Option("speculation", str, None, "what proposes tokens: draft_model (default, where given), medusa or ngram"),
    Option("draft_model", str, None, "model or heads that propose tokens (default: no speculation)"),
    Option("draft_address", str, None, "host:port of a server whose model proposes tokens (default: none)"),
    Option("trust_draft_probs", bool, False, "believe the probabilities that it sends: exact only if they are true"),
    Option("num_speculative_tokens", count, 4, "most tokens that are proposed in a round"),
    Option("enable_prefix_caching", bool, True, "share the pages of equal prompt beginnings"),
    Option("seed", count, 0, "seeds of requests that have none follow from it"),
    Option("max_decode_rounds", count, 8, "decode rounds fused into one device call while nobody waits"),
    Option("max_waiting", count, 4096, "requests that may queue"),
    Option("max_waiting_tokens", count, 4_194_304, "prompt tokens of all requests that wait for their first token"),
    Option("attention", str, None, "attention implementation by name (default: the best that serves the model)"),
    Option("int8_matmul", str, None, "int8 matmul implementation by name (default: the best for each size)"),
    Option("compile_cache", str, None, 'folder of the compile cache, or "off"'),
)
"""Arguments of LLM; a test compares names and defaults with it."""

SERVER_OPTIONS = (
    Option("host", str, "127.0.0.1", "address to listen on; one that other machines reach needs TLS or --insecure"),
    Option("port", int, 50051, "0 takes a free one"),
    Option("drain_seconds", float, 30.0, "what running requests get after SIGTERM"),
    Option("tls_cert", file, None, "PEM certificate (chain) of this server; read again when it is replaced"),
    Option("tls_key", file, None, "PEM key of that certificate"),
    Option("tls_client_ca", file, None, "PEM certificates whose owners alone may connect, with one that they signed"),
    Option("token_file", file, None, "lines of TENANT TOKEN: calls need one of the tokens; read again when it changes"),
    Option("insecure", bool, False, "listen for other machines without TLS"),
    Option("hang_seconds", float, 45.0, "an engine that has work and brings nothing for so long is NOT_SERVING"),
    Option("hang_exit_seconds", float, 300.0, "and after so long the process ends with status 1; 0: never"),
    Option("stall_timeout", float, 60.0, "seconds after which a call whose answer is not read is ended"),
    Option("max_request_bytes", count, 4 * 1024**2, "largest request"),
    Option("max_metadata_bytes", count, 16 * 1024, "most metadata of a call"),
    Option("max_streams", count, None, "calls that one connection runs at once (default: max_calls + 1,024)"),
    Option("max_calls", count, 8192, "calls that all connections run at once; more are refused"),
    Option("metrics_port", int, None, "of metrics for Prometheus, 0 takes a free one (default: no metrics)"),
    Option("metrics_host", str, "127.0.0.1", "address of that port; what holds for --host holds for it"),
    Option("metrics_compat", str, None, "vllm: show the metrics under vLLM's names too (default: ours alone)"),
    Option("request_log", bool, False, "a line of JSON on standard error for each request: counts, times, no text"),
    Option("log_level", str, "info", "least level logged: debug, info, warning, error or critical"),
    Option("otlp_endpoint", str, None, "http(s)://host:port of an OpenTelemetry collector for spans (default: none)"),
)
"""Arguments of serve.server_config.ServerConfig; a test compares names and defaults with it."""

LIMIT_OPTIONS = (
    Option("max_n", count, 16, "samples of a request"),
    Option("max_stops", count, 16, "stop strings"),
    Option("max_stop_bytes", count, 256, "bytes of a stop string"),
    Option("max_logprobs", count, 20, "log-probabilities at each position, at most 20"),
    Option("max_logit_bias", count, 300, "ids in logit_bias"),
    Option("max_bad_words", count, 300, "bad words, at most 300"),
    Option("max_schema_bytes", count, 64 * 1024, "bytes of a JSON schema"),
    Option("max_grammar_bytes", count, 64 * 1024, "bytes of a grammar"),
    Option("max_regex_bytes", count, 16 * 1024, "bytes of a regular expression"),
    Option("max_choices", count, 1024, "choices to choose an output from"),
    Option("grammar_seconds", float, 2.0, "what compiling a schema, grammar, expression or choice may take"),
    Option("template_seconds", float, 2.0, "what rendering a chat may take"),
    Option("max_template_bytes", count, 16 * 1024**2, "bytes of a rendered chat"),
)
"""Fields of request_limits.RequestLimits; a test compares names and defaults with it."""

DOCTOR_OPTIONS = tuple(
    option for option in ENGINE_OPTIONS
    if option.name in (
        "dtype", "quantization", "kv_cache_dtype", "page_size", "tensor_parallel_size", "attention", "int8_matmul"
    )
)  # fmt: skip
"""What the choice of implementations depends on."""

SAMPLING_OPTIONS = (
    Option("max_tokens", count, 128, "longest output in tokens"),
    Option("temperature", float, None, "0 is greedy (default: the model's)"),
    Option("top_p", float, None, "smallest set of tokens with this much probability"),
    Option("top_k", count, None, "most likely tokens to choose from; 0 is all"),
    Option("min_p", float, None, "least probability, as a share of the most likely token's"),
    Option("presence_penalty", float, None, "taken from the logits of tokens that were said"),
    Option("frequency_penalty", float, None, "the same, for each time they were"),
    Option("repetition_penalty", float, None, "divides the logits of tokens in prompt or output; 1 is off"),
)

STRUCTURED_OPTIONS = (
    ("json_schema", "FILE", "the output is JSON of the schema in this file"),
    ("regex", "TEXT", "the output matches this expression"),
    ("choice", "TEXT", "the output is this text; repeated, one of them"),
    ("grammar", "FILE", "the output follows the grammar in this file (Lark, as llguidance reads it)"),
)
"""What the output must look like: one of them."""


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What `checked_sampling` reads."""
    group = parser.add_argument_group("sampling")
    for option in SAMPLING_OPTIONS:
        option.add_to(group)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the output before this text; may be repeated"
    )
    group.add_argument("--bad-words", action="append", metavar="TEXT", help="never say this text; may be repeated")
    for name, metavar, text in STRUCTURED_OPTIONS:
        action = "append" if name == "choice" else "store"
        group.add_argument(f"--{name.replace('_', '-')}", action=action, metavar=metavar, help=text)


def checked_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What was given for sampling, refused at once if no model could take it. Raises InvalidRequest."""
    from jaxinfer.structured_output import check_combination
    from jaxinfer.types import SamplingParams
    from jaxinfer.validation import Limits, validate

    chosen = {"max_tokens": 128, **given(args, SAMPLING_OPTIONS)}
    for name in ("stop", "bad_words"):
        if getattr(args, name):
            chosen[name] = tuple(getattr(args, name))
    chosen |= _structured(args)
    params = SamplingParams(**chosen)
    validate([0], params, Limits(vocab_size=MOST_COUNT, max_model_len=MOST_COUNT))
    if params.structured_outputs is not None:
        check_combination(params)
    return chosen


def _structured(args: argparse.Namespace) -> dict[str, Any]:
    """`structured_outputs`, if the output must look like something. Raises InvalidRequest, OSError for a file."""
    from jaxinfer.structured_output import checked
    from jaxinfer.types import StructuredOutput

    names = {"json_schema": "json"}
    values = ((name, metavar, getattr(args, name)) for name, metavar, _ in STRUCTURED_OPTIONS)
    chosen: dict[str, Any] = {names.get(name, name): _read(value) if metavar == "FILE" else value
                              for name, metavar, value in values if value is not None}
    return {"structured_outputs": checked(StructuredOutput(**chosen))} if chosen else {}


def _read(file: str) -> str:
    with open(file, encoding="utf-8", errors="strict") as stream:
        try:
            return stream.read()
        except UnicodeDecodeError as error:
            raise InvalidRequest(file, f"is not UTF-8 text: {error}") from None


def checked_engine(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Arguments of LLM that were given, refused at once if no model could take them. Raises InvalidConfig."""
    from jaxinfer.start_options import Options

    chosen = given(args, ENGINE_OPTIONS) | given_limits(args)
    Options(model=model, **chosen).validate()
    return chosen


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """What `given_limits` reads."""
    group = parser.add_argument_group("limits of a request", "more is refused with INVALID_ARGUMENT")
    for option in LIMIT_OPTIONS:
        option.add_to(group)


def given_limits(args: argparse.Namespace) -> dict[str, Any]:
    """`request_limits`, if the command has such options and one of them was given. Raises InvalidConfig."""
    from jaxinfer.request_limits import RequestLimits

    chosen = given(args, LIMIT_OPTIONS) if hasattr(args, LIMIT_OPTIONS[0].name) else {}
    return {"request_limits": RequestLimits(**chosen)} if chosen else {}


def given(args: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """Those options that were given: the rest keep the defaults of whoever takes them."""
    values = ((option.name, getattr(args, option.name)) for option in options)
    return {name: value for name, value in values if value is not None}
