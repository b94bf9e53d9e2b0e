"""How the demo looks: live panels on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

from serve.answers import Delta

COLUMN_CHARS = 40
"""Narrower panels would cut most lines of code."""
COLUMNS = (4, 2)
MOST_LINES, LEAST_LINES = 12, 3
REFRESHES_PER_SECOND = 12


class View(AbstractContextManager, Protocol):
    """Shows streams while it is entered, and a table afterwards."""

    def update(self, number: int, delta: Delta) -> None:
        """Prompt `number` goes on."""
        ...

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], totals: Sequence[str]) -> None: ...


def make_view(prompts: Sequence[str]) -> View:
    """The best view for where the output goes."""
    return LiveView(prompts) if sys.stdout.isatty() else PlainView(prompts)


class PlainView:
    """Each line of text as soon as it is complete, with the number of its prompt."""

    def __init__(self, prompts: Sequence[str]):
        self._rest = list(prompts)

    def __enter__(self) -> Self:
        for number in range(len(self._rest)):
            self._print_lines(number)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, rest in enumerate(self._rest):
            if rest:
                self._print(number, rest)

    def update(self, number: int, delta: Delta) -> None:
        self._rest[number] += delta.text
        self._print_lines(number)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], totals: Sequence[str]) -> None:
        lines = [headings, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
        print()
        for line in lines:
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
        print("\n" + "\n".join(totals), flush=True)

    def _print_lines(self, number: int) -> None:
        *complete, self._rest[number] = self._rest[number].split("\n")
        for line in complete:
            self._print(number, line)

    def _print(self, number: int, line: str) -> None:
        print(f"{number + 1} | {line}", flush=True)


class LiveView:
    """One panel a prompt with the end of its text; a green border when it is done."""

    def __init__(self, prompts: Sequence[str], **console: Any):
        from rich.console import Console
        from rich.live import Live

        self._prompts = prompts
        self._texts = [""] * len(prompts)
        self._ends: list[str | None] = [None] * len(prompts)
        self._console = Console(highlight=False, **console)
        self._live = Live(console=self._console, get_renderable=self._panels, refresh_per_second=REFRESHES_PER_SECOND)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._live.__exit__(*exc_info)

    def update(self, number: int, delta: Delta) -> None:
        self._texts[number] += delta.text
        self._ends[number] = delta.finish_reason

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], totals: Sequence[str]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, header_style="bold")
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        self._console.print(table)
        for line in totals:
            self._console.print(f"  {line}", style="bold", markup=False)
        self._console.print()

    def _panels(self) -> Any:
        from rich.table import Table

        columns = next((count for count in COLUMNS if count * COLUMN_CHARS <= self._console.width), 1)
        height = (self._console.height - 1) // -(-len(self._texts) // columns)
        num_lines = max(LEAST_LINES, min(MOST_LINES, height - 2))
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        panels = [self._panel(number, num_lines) for number in range(len(self._texts))]
        for start in range(0, len(panels), columns):
            grid.add_row(*panels[start:start + columns])
        return grid

    def _panel(self, number: int, num_lines: int) -> Any:
        """The last lines of prompt and text."""
        from rich.panel import Panel
        from rich.text import Text

        prompt, end = self._prompts[number], self._ends[number]
        text = Text.assemble((prompt, "dim"), self._texts[number])
        shown = Text("\n", no_wrap=True, overflow="crop").join(text.split("\n", allow_blank=True)[-num_lines:])
        return Panel(shown, height=num_lines + 2, border_style="green" if end else "cyan", title=str(number + 1),
                     title_align="left", subtitle=end, subtitle_align="right")
