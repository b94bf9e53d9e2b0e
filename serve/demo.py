"""`make demo`: serves the shipped model, sends it eight prompts at once, shows the streams and a table, and stops."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import grpc

from jaxinfer.core import Load
from serve.answers import Timings, Usage
from serve.client import AsyncClient, Envelope
from serve.demo_view import View, make_view

SERVER = (sys.executable, "-m", "jaxinfer.cli", "serve", "--model", "demo", "--port", "0", "--max-model-len", "1024")
HEADER = '''"""Reads and writes the tables of the application.

The classes here do not lock anything, so a table must not be used by two threads at the same time.
"""

import os
import sys
from collections import OrderedDict, namedtuple

__all__ = ["Table", "Reader", "main", "read_file"]


'''
PROMPTS = (
    "def fibonacci(n):",
    "class Stack:",
    "import os\n\ndef main():",
    "try:\n    import json\nexcept",
    HEADER + "class Table:",
    HEADER + "class Reader:",
    HEADER + "def main(args):",
    HEADER + "def read_file(path):",
)
"""The last four begin alike: three of them take the pages of their beginning from the first. None ends in white space:
to the demo's tokenizer a line break and the indentation behind it are one token."""
SAMPLING: Envelope = {"max_tokens": 128, "temperature": 0.6, "top_p": 0.95}
WAIT_SECONDS, STOP_SECONDS = 5.0, 20.0
NAME_CHARS = 32
POLL_SECONDS = 0.05


@dataclass(slots=True)
class Answer:
    """What came of one prompt."""

    prompt: str
    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(slots=True)
class Show:
    """The whole performance."""

    answers: list[Answer]
    loads: list[Load] = field(default_factory=list)
    seconds: float = 0.0


class ServerFailed(Exception):
    """The service did not start, or did not stop as it should."""


@contextmanager
def server(command: Sequence[str]) -> Iterator[str]:
    """Starts the service and yields its address; at the end stops it with SIGTERM. Raises ServerFailed."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own command
        try:
            yield ready_address(process)
            process.send_signal(signal.SIGTERM)
            last_words, _ = process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"the service did not stop within {STOP_SECONDS:g} s of SIGTERM") from None
        finally:
            process.kill()  # without effect if it has ended
    print("".join(f"  {line}\n" for line in last_words.splitlines()), end="")
    if process.returncode != 0:
        raise ServerFailed(f"the service stopped with exit code {process.returncode}")


def ready_address(process: subprocess.Popen[str]) -> str:
    """Shows what the service says while it starts, until it says that it is ready; returns its address."""
    if process.stdout is None:
        raise ServerFailed("the service's output is not connected")
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        if line.startswith("ready on "):
            return line.split()[2].rstrip(":")
    raise ServerFailed(f"the service ended with exit code {process.wait()} before it was ready")


async def perform(address: str, prompts: Sequence[str], view: View) -> Show:
    """All prompts at once, shown as they stream."""
    show = Show([Answer(prompt) for prompt in prompts])
    async with AsyncClient(address) as client:
        await client.wait_ready(WAIT_SECONDS)
        watching = asyncio.create_task(watch(client, show))
        began = time.monotonic()
        await asyncio.gather(*(follow(client, number, answer, view) for number, answer in enumerate(show.answers)))
        show.seconds = time.monotonic() - began
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    return show


async def follow(client: AsyncClient, number: int, answer: Answer, view: View) -> None:
    """Streams one prompt."""
    stream = client.stream(answer.prompt, **SAMPLING | {"seed": number})
    async for delta in stream:
        answer.text += delta.text
        answer.finish_reason = delta.finish_reason
        view.update(number, delta)
    answer.usage, answer.timings = stream.usage, stream.timings


async def watch(client: AsyncClient, show: Show) -> None:
    """Notes how busy the engine is while the streams run."""
    while True:
        show.loads.append(await client.load())
        await asyncio.sleep(POLL_SECONDS)


HEADINGS = ("prompt", "tokens", "end", "TTFT", "inter-token", "tokens/s", "prefix hit")


def rows(show: Show) -> list[tuple[str, ...]]:
    """The table's lines, one a prompt."""
    return [row(answer) for answer in show.answers]


def row(answer: Answer) -> tuple[str, ...]:
    usage, timings = answer.usage, answer.timings
    name = shortened(" / ".join(line.strip() for line in answer.prompt.splitlines() if line.strip()))
    if usage is None or timings is None:
        return (name, *["-"] * (len(HEADINGS) - 1))
    gap = timings.decode / max(usage.output_tokens - 1, 1)
    hit = "unknown" if usage.cached_tokens is None else f"{usage.cached_tokens} of {usage.prompt_tokens}"
    return (name, str(usage.output_tokens), answer.finish_reason or "-", f"{timings.ttft * 1e3:.0f} ms",
            f"{gap * 1e3:.1f} ms", f"{usage.output_tokens / max(timings.total, 1e-9):.0f}", hit)


def shortened(text: str) -> str:
    """The end of a text, which is where prompts differ."""
    return text if len(text) <= NAME_CHARS else f"\u2026{text[1 - NAME_CHARS:]}"


def totals(show: Show) -> list[str]:
    """What the table says of all prompts together."""
    usages = [answer.usage for answer in show.answers if answer.usage is not None]
    tokens = sum(usage.output_tokens for usage in usages)
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    cached = sum(usage.cached_tokens or 0 for usage in usages)
    lines = [f"{tokens} tokens in {show.seconds:.2f} s: {tokens / max(show.seconds, 1e-9):.0f} tokens/s together",
             f"prefix hits: {cached} of {prompt_tokens} prompt tokens"]
    if show.loads:
        most = max(show.loads, key=lambda load: load.pages_used)
        rows_at_once = max(load.num_running for load in show.loads)
        lines.append(f"at most {most.pages_used} of {most.pages_total} pages used, {rows_at_once} rows at once")
    return lines


def main(command: Sequence[str] = SERVER, prompts: Sequence[str] = PROMPTS) -> int:
    print(f"starting the service: {' '.join(command[1:])}", flush=True)
    try:
        with server(command) as address:
            print(f"\n{len(prompts)} prompts at once\n", flush=True)
            with make_view(prompts) as view:
                show = asyncio.run(perform(address, prompts, view))
            view.table(HEADINGS, rows(show), totals(show))
    except (ServerFailed, grpc.RpcError, TimeoutError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("the service has stopped cleanly")
    return 0


if __name__ == "__main__":
    sys.exit(main())
