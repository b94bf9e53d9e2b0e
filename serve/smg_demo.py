"""`make smg-demo`: two servers of the shipped model behind the gateway `smg`, asked through the `openai` client.

Shows the OpenAI API, then a load during which one server is killed, then an overload of the other one.
"""

import contextlib
import importlib.util
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from subprocess import PIPE, Popen
from typing import Any

from serve.demo import HEADER, STOP_SECONDS, ServerFailed, ready_address
from serve.gateway import GatewayFailed, gateway

try:
    import openai
except ModuleNotFoundError:  # `main` says so, and how to get it
    openai: Any = None

NEEDED: Mapping[str, str] = {"smg": "smg>=1.13", "smg_grpc_proto": "smg-grpc-proto>=0.4.28", "openai": "openai>=3.57",
                             "llguidance": "llguidance>=1.9"}
"""Modules that jaxinfer can do without and this cannot, and what pip calls them."""
SERVER = (sys.executable, "-m", "jaxinfer.cli", "serve", "--model", "demo", "--port", "0", "--max-model-len", "1024",
          "--max-num-seqs", "16", "--max-waiting", "32")
NUM_SERVERS = 2
COLOR = {"type": "object", "properties": {"red": {"type": "integer", "minimum": 0, "maximum": 255}},
         "required": ["red"], "additionalProperties": False}
PROMPTS = tuple(f"{HEADER}class {name}:" for name in ("Table", "Reader", "Writer", "Cursor"))
"""They begin alike, and so go to one server until it has too much to do; others go where there is room."""
NUM_REQUESTS, NUM_AT_ONCE, KILL_AFTER = 96, 16, 24
OVERLOAD = 120
"""Requests at once, for a server that runs 16 and lets 32 wait."""

Say = Callable[[str], None]


class OpenAI:
    """The calls of the `openai` client that we show, with the model's name filled in."""

    def __init__(self, url: str):
        # Retries are the gateway's; what it answers is what we want to see.
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self.model = ""

    def close(self) -> None:
        self.client.close()

    def find_model(self) -> str:
        self.model = self.client.models.list().data[0].id
        return self.model

    def chat(self, content: str, **options: Any) -> Any:
        messages: list[Any] = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def complete(self, prompt: str, **options: Any) -> Any:
        return self.client.completions.create(model=self.model, prompt=prompt, **options)


def show_api(api: OpenAI, say: Say) -> None:
    """One request of each kind. Raises openai.APIError, or ValueError for a JSON text that is none."""
    say(f"models        {api.find_model()}")
    answer = api.chat("What does a stack do?", max_tokens=24, temperature=0)
    say(f"chat          {answer.choices[0].message.content!r}")
    parts = api.chat("What does a stack do?", max_tokens=24, temperature=0, stream=True)
    say(f"chat, stream  {[part.choices[0].delta.content for part in parts if part.choices]}")
    answer = api.complete("def fibonacci(n):", max_tokens=24, temperature=0)
    say(f"completion    {answer.choices[0].text!r}")
    answer = api.complete("def fibonacci(n):", max_tokens=24, temperature=0, stop=["number"])
    say(f"stop string   {answer.choices[0].text!r} {answer.choices[0].finish_reason}")
    form = {"type": "json_schema", "json_schema": {"name": "color", "schema": COLOR, "strict": True}}
    text = api.chat("A color?", max_tokens=64, temperature=1, seed=1, response_format=form).choices[0].message.content
    say(f"JSON schema   {json.loads(text)}")


# ---- load


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request. kind: "answered", an HTTP status, or an error within a stream that had begun."""

    kind: str
    seconds: float


def ask(api: OpenAI, prompt: str, *, stream: bool, **options: Any) -> Outcome:
    """One completion, to its end. Only errors that name a status or a reason are an outcome; others are raised."""
    began = time.monotonic()
    try:
        kind = follow(api, prompt, options) if stream else whole(api, prompt, options)
    except openai.APIStatusError as error:
        kind = f"HTTP {error.status_code}"
    return Outcome(kind, time.monotonic() - began)


def whole(api: OpenAI, prompt: str, options: dict[str, Any]) -> str:
    reason = api.complete(prompt, **options).choices[0].finish_reason
    return "answered" if reason in ("stop", "length") else f"ended: {reason}"


def follow(api: OpenAI, prompt: str, options: dict[str, Any]) -> str:
    """A stream's status is sent before its first token, so what happens later is an error event in it."""
    reason = None
    stream = api.complete(prompt, stream=True, **options)
    try:
        for part in stream:
            reason = part.choices[0].finish_reason or reason if part.choices else reason
    except openai.APIStatusError:
        raise
    except openai.APIError as error:
        return "error event" if error.body else f"cut off: {error}"
    return "answered" if reason in ("stop", "length") else f"ended: {reason}"


def load(api: OpenAI, prompts: Sequence[str], count: int, at_once: int, meanwhile: Callable[[int], None],
         **options: Any) -> list[Outcome]:
    """So many completions, every other one streamed. meanwhile: told how many have ended, after each."""
    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(ask, api, prompts[i % len(prompts)], stream=i % 2 == 0, seed=i, **options)
                   for i in range(count)]
        found = []
        for one in running:
            found.append(one.result())
            meanwhile(len(found))
    return found


def table(outcomes: Iterable[Outcome]) -> list[str]:
    outcomes = list(outcomes)
    counts = Counter(one.kind for one in outcomes)
    slowest = max(one.seconds for one in outcomes)
    return [f"{number:5}  {kind}" for kind, number in counts.most_common()] + [f"       slowest {slowest:.1f} s"]


# ---- the whole


@contextlib.contextmanager
def servers(command: Sequence[str], count: int) -> Iterator[list[tuple[Popen[str], str]]]:
    """Starts servers one after the other (the later ones find what the first has compiled); stops those that live."""
    with contextlib.ExitStack() as stack:
        found: list[tuple[Popen[str], str]] = []
        for _ in range(count):
            process = stack.enter_context(Popen(command, stdout=PIPE, text=True))  # noqa: S603 - our own command
            stack.callback(end, process)
            found.append((process, ready_address(process)))
        yield found


def end(process: "Popen[str]") -> None:
    process.terminate()
    with contextlib.suppress(Exception):  # one that hangs is killed; one that was killed before has nothing to say
        process.communicate(timeout=STOP_SECONDS)
    process.kill()


def perform(command: Sequence[str], say: Say) -> None:
    """Raises ServerFailed, GatewayFailed, openai.APIError or ValueError."""
    with servers(command, NUM_SERVERS) as started, gateway([address for _, address in started]) as front, \
            contextlib.closing(OpenAI(front.url)) as api:
        say(f"\nthe OpenAI API is on {front.url}/v1, behind it {NUM_SERVERS} servers\n")
        show_api(api, say)
        victim, address = started[-1]

        def kill(num_ended: int) -> None:
            if num_ended == KILL_AFTER:
                victim.kill()
                say(f"\nkilled the server on {address} while {NUM_AT_ONCE} requests ran")

        for line in table(load(api, PROMPTS, NUM_REQUESTS, NUM_AT_ONCE, kill, max_tokens=96, temperature=0.8)):
            say(line)
        say(f"\n{OVERLOAD} requests at once for the server that is left, which lets 32 wait")
        for line in table(load(api, PROMPTS, OVERLOAD, OVERLOAD, lambda _: None, max_tokens=96, temperature=0.8)):
            say(line)


def what_is_missing() -> str:
    """Which packages, and the command that installs them; "" if none."""
    names = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    install = shlex.join([sys.executable, "-m", "pip", "install", *(NEEDED[name] for name in names)])
    return f"{', '.join(names)} missing; install with: {install}" if names else ""


def main(command: Sequence[str] = SERVER) -> int:
    if missing := what_is_missing():
        print(f"smg-demo: {missing}", file=sys.stderr)
        return 1
    try:
        perform(command, lambda line: print(line, flush=True))
    except (ServerFailed, GatewayFailed, openai.APIError, ValueError) as error:
        print(f"smg-demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
