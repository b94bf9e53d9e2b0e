"""The help of the command line: without jax, fast, and with examples that parse."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer import cli, command_parser

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("generate", "chat", "serve", "convert", "bench", "bench serve", "doctor")
HELP = [["--help"], ["--version"], *([*command.split(), "--help"] for command in COMMANDS)]
MAX_HELP_SECONDS = 0.3


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "jaxinfer.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_never_imports_jax(arguments):
    result = run(*arguments)
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"jax", "jaxlib", "numpy", "grpc", "flax", "tokenizers"}


@pytest.mark.parametrize("arguments", HELP[:3], ids=" ".join)
def test_help_is_fast(arguments):
    def seconds() -> float:
        # Processor time, best of several: on a busy machine the clock on the wall measures the others.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "jaxinfer.cli", *arguments], cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < MAX_HELP_SECONDS


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and cli.EXIT_CODES in text
    example = text.partition("example:\n  ")[2].partition("\n")[0]
    words = example.replace('"', "").split()
    assert example.startswith(f"jaxinfer {command} ")
    args, unknown = cli.make_parser().parse_known_args(command_parser.joined(words[1:]))
    assert args.run.__name__.replace("_", " ") == command and not unknown
