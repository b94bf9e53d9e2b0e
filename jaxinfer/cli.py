"""The command line: `jaxinfer generate | chat | serve | convert | bench | bench serve | doctor`.

The composition root: it alone may import `serve`, and nothing imports it. Each command imports what it needs when it
runs, so that `--help` and `--version` start neither jax nor numpy.

Exit codes: 0 done; 1 failed, with one line on standard error; 2 the command line is wrong; 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jaxinfer
from jaxinfer import shadowing
from jaxinfer.bench_serve_options import BENCH_SERVE_OPTIONS, add_bench_serve_options
from jaxinfer.command_parser import (
    EXIT_CODES,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Parser,
    WrongUsage,
    add_command,
    checked_usage,
    joined,
)
from jaxinfer.errors import InvalidRequest, JaxInferError
from jaxinfer.options import (
    DOCTOR_OPTIONS,
    ENGINE_OPTIONS,
    SERVER_OPTIONS,
    add_limit_options,
    add_sampling_options,
    checked_engine,
    checked_sampling,
    count,
    given,
)

if TYPE_CHECKING:
    from jaxinfer import LLM, SamplingParams


# Commands. Each returns an exit code.


def generate(args: argparse.Namespace) -> int:
    if args.model is None and args.words:
        args.model, *args.words = args.words
    prompts = args.words or [read_prompt()]
    chosen = checked_for_model(args)
    with make_llm_aside(args) as llm:
        params = replace(llm.get_default_sampling_params(), **chosen)
        if args.json:
            for output in llm.generate(prompts, params):
                print(json.dumps(as_json(output), ensure_ascii=False))
        elif len(prompts) == 1:
            print_stream(llm, prompts[0], params)
        else:
            for output in llm.generate(prompts, params):
                print(f"--- {output.prompt}\n{output.outputs[0].text}")
    return 0


def checked_for_model(args: argparse.Namespace) -> dict[str, Any]:
    """`checked_sampling`; and what the output must look like is compiled, which takes no engine."""
    with checked_usage():
        chosen = checked_sampling(args)
    if "structured_outputs" in chosen:
        from jaxinfer.shape_check import check_shape

        check_shape(chosen["structured_outputs"], model_of(args), args.tokenizer)
    return chosen


def read_prompt() -> str:
    if sys.stdin.isatty():
        print("type the prompt; Ctrl-D ends it", file=sys.stderr)
    text = sys.stdin.read()
    if not text:
        raise InvalidRequest("prompt", "standard input is empty; name prompts behind the model, or pipe one in")
    return text


def as_json(output: Any) -> dict[str, Any]:
    """What `generate --json` prints of one RequestOutput."""
    sample = output.outputs[0]
    return {
        "prompt": output.prompt,
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
    }


def chat(args: argparse.Namespace) -> int:
    chosen = checked_for_model(args)
    with make_llm_aside(args) as llm:
        params = replace(llm.get_default_sampling_params(), **chosen)
        system = [{"role": "system", "content": args.system}] if args.system else []
        messages = list(system)
        print("type a message; /reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer", file=sys.stderr)
        while (line := read_line()) is not None and line != "/exit":
            if line == "/reset":
                messages = list(system)
            elif line:
                messages.append({"role": "user", "content": line})
                answer = chat_turn(llm, messages, params)
                messages.append({"role": "assistant", "content": answer})
    return 0


def chat_turn(llm: "LLM", messages: list[dict[str, str]], params: "SamplingParams") -> str:
    """One streamed answer; Ctrl-C ends it and keeps the conversation."""
    pieces: list[str] = []
    try:
        print_stream(llm, messages, params, pieces)
    except KeyboardInterrupt:
        print()
    return "".join(pieces)


def read_line() -> str | None:
    """The user's next line; None at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return None


def serve(args: argparse.Namespace) -> int:
    shadowing.check("serve")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read at its import; a line for each bad handshake otherwise
    from serve import server

    engine_arguments(args)  # refuses before a port is taken
    with checked_usage():
        config = server.ServerConfig(**given(args, SERVER_OPTIONS))
    return server.serve(lambda: make_llm(args).core, config)


def convert(args: argparse.Namespace) -> int:
    from jaxinfer import conversion

    conversion.convert(args.source, args.target, dtype=None if args.dtype == "auto" else args.dtype,
                       quantization=args.quantization, with_kv_ranges=args.kv_ranges)
    print(f"wrote {args.target}")
    return 0


def bench(args: argparse.Namespace) -> int:
    from jaxinfer import quick_bench

    with checked_usage():
        load = quick_bench.Load(args.num_prompts, args.input_len, args.output_len)
    with make_llm_aside(args) as llm:
        result = quick_bench.run(llm, load)
    print(json.dumps(result.as_dict()) if args.json else result.table())
    return 0


def bench_serve(args: argparse.Namespace) -> int:
    shadowing.check("serve")
    from serve.bench import command
    from serve.bench.config import BenchConfig

    with checked_usage():
        config = BenchConfig(**given(args, BENCH_SERVE_OPTIONS))
    return command.run(config)


def doctor(args: argparse.Namespace) -> int:
    from jaxinfer import doctor as report

    findings = report.examine(model_of(args), **given(args, DOCTOR_OPTIONS))
    print(json.dumps(findings.as_dict(), indent=2) if args.json else findings.text())
    return EXIT_FAILED if findings.warnings else 0


def make_llm(args: argparse.Namespace) -> "LLM":
    from jaxinfer import LLM

    return LLM(model_of(args), **engine_arguments(args), quiet=getattr(args, "quiet", False))


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Those of LLM that were given. Raises WrongUsage."""
    with checked_usage():
        return checked_engine(args, model_of(args))


def model_of(args: argparse.Namespace) -> str:
    """`--model FOLDER`, or the word in front."""
    return args.model or next(iter(args.words), "demo")


def make_llm_aside(args: argparse.Namespace) -> "LLM":
    """As `make_llm`; what the start says goes to standard error, since it is not the command's output."""
    with contextlib.redirect_stdout(sys.stderr):
        return make_llm(args)


def print_stream(llm: "LLM", prompt: Any, params: "SamplingParams", pieces: list[str] | None = None) -> None:
    """Print an output as it comes; `pieces` collects it."""
    with contextlib.closing(llm.stream(prompt, params)) as deltas:  # type: ignore[type-var]
        for delta in deltas:
            if pieces is not None:
                pieces.append(delta.text)
            print(delta.text, end="", flush=True)
    print()


# The parser.


def add_model(parser: Parser, more_words: str | None = None) -> None:
    """The model as the first word or as an option; `more_words` says what may follow it."""
    text = "model folder, or demo (default: demo)"
    parser.add_argument("words", nargs="*", metavar="MODEL", help=f"{text}{f'; {more_words}' if more_words else ''}")
    parser.add_argument("--model", metavar="FOLDER", help="the same as an option")
    parser.set_defaults(max_words=sys.maxsize if more_words else 1)


def add_engine_options(parser: Parser) -> None:
    group = parser.add_argument_group("engine")
    for option in ENGINE_OPTIONS:
        option.add_to(group)


def make_parser() -> Parser:
    parser = Parser(
        prog="jaxinfer",
        description="Generate text with a language model on TPU, GPU or CPU, here or as a gRPC service.",
        epilog=f"jaxinfer COMMAND --help shows its options and an example\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxinfer {jaxinfer.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_generate(commands)
    add_chat(commands)
    add_serve(commands)
    add_convert(commands)
    add_bench(commands)
    add_bench_serve(commands)
    add_doctor(commands)
    return parser


def add_generate(commands: Any) -> None:
    parser = add_command(
        commands,
        generate,
        "[MODEL] [PROMPT ...]",
        "complete prompts and print the outputs",
        'jaxinfer generate demo "def fibonacci(n):" --max-tokens 64',
    )
    add_model(parser, "then prompts; without any, standard input is one")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the output")
    add_engine_options(parser)
    add_sampling_options(parser)


def add_chat(commands: Any) -> None:
    parser = add_command(
        commands, chat, "[MODEL]", "talk to a model", "jaxinfer chat ~/models/Qwen3-0.6B --temperature 0.7"
    )
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--quiet", action="store_true", help="print nothing about the start")
    add_engine_options(parser)
    add_sampling_options(parser)


def add_serve(commands: Any) -> None:
    parser = add_command(
        commands, serve, "[MODEL]", "serve a model over gRPC until SIGTERM",
        "jaxinfer serve ~/models/Qwen3-0.6B --port 50051",
    )  # fmt: skip
    add_model(parser)
    group = parser.add_argument_group("server")
    for option in SERVER_OPTIONS:
        option.add_to(group)
    add_limit_options(parser)
    add_engine_options(parser)


def add_convert(commands: Any) -> None:
    parser = add_command(
        commands,
        convert,
        "SOURCE TARGET",
        "write a model folder in our own form, which loads faster",
        "jaxinfer convert ~/models/Qwen3-0.6B ~/models/Qwen3-0.6B-jaxinfer --quantization int8",
    )
    parser.add_argument("source", metavar="SOURCE", help="model folder in the Hugging Face layout")
    parser.add_argument("target", metavar="TARGET", help="folder to write; must not exist")
    dtypes = ("auto", "bfloat16", "float32")
    parser.add_argument(
        "--dtype", default="auto", choices=dtypes, help="of the result (default: auto, the checkpoint's)"
    )
    parser.add_argument(
        "--quantization", metavar="TEXT", help="int8 (weights and activations) or int8_weight_only (default: none)"
    )
    parser.add_argument(
        "--kv-ranges",
        action="store_true",
        help="run the model once and store how large keys and values get: int8 and fp8 pages then need no measuring",
    )


def add_bench(commands: Any) -> None:
    parser = add_command(
        commands,
        bench,
        "[MODEL]",
        "measure throughput and latency with random prompts",
        "jaxinfer bench demo --num-prompts 64 --input-len 128 --output-len 128",
    )
    add_model(parser)
    parser.add_argument(
        "--num-prompts", type=count, default=64, metavar="N", help="requests, sent at once (default: 64)"
    )
    parser.add_argument("--input-len", type=count, default=128, metavar="N", help="tokens a prompt (default: 128)")
    parser.add_argument("--output-len", type=count, default=128, metavar="N", help="tokens an output (default: 128)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_engine_options(parser)


def add_bench_serve(commands: Any) -> None:
    parser = add_command(
        commands,
        bench_serve,
        "",
        "measure a running server: requests at a rate, their latencies, goodput",
        "jaxinfer bench serve --request-rate 4 --num-prompts 200 --goodput ttft:200 tpot:50",
    )
    add_bench_serve_options(parser)


def add_doctor(commands: Any) -> None:
    parser = add_command(
        commands,
        doctor,
        "[MODEL]",
        "show devices, versions, memory and which implementation would run; fails when something is amiss",
        "jaxinfer doctor ~/models/Qwen3-0.6B",
    )
    add_model(parser)
    for option in DOCTOR_OPTIONS:
        option.add_to(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def take_words(args: argparse.Namespace, unknown: list[str]) -> None:
    """argparse takes words only up to the next option: those after it come here, with everything that is a mistake."""
    if hasattr(args, "words") and not any(text.startswith("-") for text in unknown):
        args.words = [*args.words, *unknown]
        unknown = args.words[args.max_words - (args.model is not None) :]
    if unknown:
        args.parser.unknown(unknown)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args, unknown = make_parser().parse_known_args(joined(sys.argv[1:] if argv is None else argv))
    take_words(args, unknown)
    try:
        return args.run(args)
    except WrongUsage as error:
        return fail(str(error), EXIT_USAGE)
    except JaxInferError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def fail(message: str, status: int = EXIT_FAILED) -> int:
    """One line on standard error, whatever the message looks like."""
    print(f"jaxinfer: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
