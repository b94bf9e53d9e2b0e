"""How the command line reads its words: mistakes in one line, commands of several words. No jax here."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from jaxinfer.errors import InvalidConfig, InvalidRequest

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
EXIT_CODES = "exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted"
LONG_COMMANDS = (("bench", "serve"),)
"""Commands of two words. argparse knows one word, so they are joined to one before it reads them."""


class WrongUsage(Exception):
    """Options have values that can never work, or that do not go together."""


@contextmanager
def checked_usage() -> Iterator[None]:
    """For what is made of the command line alone: a refusal raises WrongUsage."""
    try:
        yield
    except (InvalidConfig, InvalidRequest) as error:
        raise WrongUsage(str(error)) from None


class Parser(argparse.ArgumentParser):
    """Answers mistakes in one line, with the nearest name."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"COMMAND: invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            choices = [choice.strip("' ") for choice in wrong[2].split(",")]
            message = f"unknown command {wrong[1]!r}{nearest(wrong[1], choices)}"
        self.exit(EXIT_USAGE, f"{self.prog}: {message} ({self.prog} --help lists all)\n")

    def unknown(self, arguments: Sequence[str]) -> NoReturn:
        """Complain about what no option took."""
        flag = next((text for text in arguments if text.startswith("-")), None)
        if flag is None:
            self.error(f"unexpected {arguments[0]}")
        known = [name for action in self._actions for name in action.option_strings]
        self.error(f"unknown option {flag}{nearest(flag.partition('=')[0], known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def add_command(
    commands: Any, run: Callable[[argparse.Namespace], int], words: str, text: str, examples: str
) -> Parser:
    """A sub-parser whose help ends with a line to copy. The command is named after `run`, in one word or several."""
    name = run.__name__.replace("_", " ")
    parser = commands.add_parser(
        name,
        usage=f"jaxinfer {name} {f'{words} ' if words else ''}[options]",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with the words of a long command as one; a model called like its end is written ./serve."""
    front = tuple(arguments[:2])
    return [" ".join(front), *arguments[2:]] if front in LONG_COMMANDS else list(arguments)
