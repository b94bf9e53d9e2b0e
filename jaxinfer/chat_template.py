"""Chat templates, rendered in a killable worker process.

A template comes from the model folder only, never from a request, but a downloaded folder is not trusted
either. Jinja's sandbox stops reads of attributes and nothing else: `{{ "a" * 500000000 }}` is legal in it. So
templates run in a child process whose wall time, memory and output are bounded; nothing in the server waits
longer than `Bounds.seconds` (plus the child's start at the first render), and a child that breaks a bound is
killed and replaced.
"""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import IO, Any

from jaxinfer.child_process import NotReady, Worker, limit_memory, send
from jaxinfer.errors import InvalidRequest, JaxInferError, ModelFormatError
from jaxinfer.request_limits import RequestLimits
from jaxinfer.validation import check_text, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have: free text here would let a client write the template's own markers."""
MESSAGE_KEYS = ("role", "content", "name")
MAX_MESSAGES = 4096
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_NAME_BYTES = 256
MAX_SOURCE_BYTES = 256 * 1024
"""Templates in the wild are at most about 20 kB."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one render may cost: wall seconds, bytes of UTF-8 output, bytes of the child's address space."""

    seconds: float = 2.0
    output_bytes: int = 16 * 1024 * 1024
    memory_bytes: int = 384 * 1024 * 1024


def render_bounds(limits: RequestLimits) -> Bounds:
    """Those of a render, by what an operator allows."""
    return Bounds(seconds=limits.template_seconds, output_bytes=limits.max_template_bytes)


class ChatTemplate:
    """A model's chat template. Thread-safe: renders take turns, each about a millisecond.

    source: jinja text. special_tokens: "bos_token" and so on, variables of the template. options: further
    variables, fixed by whoever starts the model (`enable_thinking`), never by a request. The child starts
    with the first render or `start()` and ends with `close()` or with this process.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None,
                 options: Mapping[str, Any] | None = None, bounds: Bounds = Bounds()):
        if len(source.encode(errors="replace")) > MAX_SOURCE_BYTES:
            raise ModelFormatError(f"the chat template is over {MAX_SOURCE_BYTES} bytes")
        setup = {"source": source, "bounds": asdict(bounds),
                 "variables": {**(special_tokens or {}), **(options or {})}}
        self._bounds = bounds
        self._worker = Worker("jaxinfer.chat_template:serve_renders", lambda: setup)

    def start(self) -> None:
        """Starts the child and compiles the template. Raises ModelFormatError if it does not compile."""
        try:
            self._worker.start()
        except NotReady as error:
            raise _not_ready(error) from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation.

        Raises InvalidRequest for bad messages, for what the template itself refuses, and for a broken bound;
        ModelFormatError when the template does not compile or leaves the sandbox.
        """
        job = {"messages": checked_messages(messages), "add_generation_prompt": bool(add_generation_prompt)}
        try:
            reply = self._worker.ask(job, self._bounds.seconds)
        except NotReady as error:
            raise _not_ready(error) from None
        if reply is None:
            raise InvalidRequest("messages", f"the chat template broke its limits ({self._bounds.seconds:g} s, "
                                 f"{self._bounds.memory_bytes} bytes of memory); send fewer or shorter messages")
        return _text_of(reply)

    def close(self) -> None:
        """Ends the child. A later render starts a new one."""
        self._worker.close()


def checked_messages(messages: Any) -> list[dict[str, str]]:
    """Messages as role, content and perhaps name, all strings. Raises InvalidRequest naming the message."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequest("messages", f"must be a list with at least one message, got {shown(messages)}")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest("messages", f"has {len(messages)} messages; the limit is {MAX_MESSAGES}")
    found = [_checked_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    size = sum(len(message["content"].encode()) for message in found)
    if size > MAX_MESSAGE_BYTES:
        raise InvalidRequest("messages", f"hold {size} bytes; the limit is {MAX_MESSAGE_BYTES}")
    return found


def _checked_message(field: str, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(field, f"must be an object with role and content, got {shown(message)}")
    for key in message:
        if key not in MESSAGE_KEYS:
            raise InvalidRequest(field, f"has an unknown key {shown(key)}; known are {', '.join(MESSAGE_KEYS)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{field}.role", f"must be one of {', '.join(ROLES)}, got {shown(role)}")
    found = {"role": role, "content": _content(f"{field}.content", message.get("content"))}
    if message.get("name") is not None:
        check_text(f"{field}.name", message["name"], max_bytes=MAX_NAME_BYTES)
        found["name"] = message["name"]
    return found


def _content(field: str, content: Any) -> str:
    """Text, or text parts joined by new lines (as vLLM does for templates that take plain strings)."""
    if not isinstance(content, (list, tuple)):
        check_text(field, content)
        return content
    if len(content) > MAX_MESSAGES:
        raise InvalidRequest(field, f"has {len(content)} parts; the limit is {MAX_MESSAGES}")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise InvalidRequest(f"{field}[{i}]", f"must be a part of type 'text', got {shown(part)}; "
                                 "only text is supported")
        check_text(f"{field}[{i}].text", part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)


def _text_of(reply: Mapping[str, Any]) -> str:
    """The text of a reply. Raises what it stands for instead."""
    if "text" in reply:
        return reply["text"]
    raise _error_of(reply)


def _not_ready(error: NotReady) -> JaxInferError:
    return _error_of(error.reply or {"kind": "format", "problem": "broke its limits while compiling"})


def _error_of(reply: Mapping[str, Any]) -> JaxInferError:
    kinds: dict[str, Callable[[str], JaxInferError]] = {
        "refused": lambda problem: InvalidRequest("messages", f"the chat template refuses them: {problem}"),
        "failed": lambda problem: InvalidRequest("messages", f"the chat template failed on them: {problem}"),
        "format": lambda problem: ModelFormatError(f"the chat template {problem}"),
    }
    return kinds[reply["kind"]](reply["problem"])


# --- Everything below runs in the child. ---

MAX_PROBLEM_CHARS = 300


class _Refused(Exception):
    """The template called raise_exception."""


def serve_renders(setup: dict[str, Any], requests: IO[bytes], replies: IO[bytes]) -> None:
    """The child's loop: compiles the template, then answers render jobs until its input ends."""
    bounds = Bounds(**setup["bounds"])
    template: list[Any] = []

    def compile_it() -> dict[str, Any]:
        template.append(_environment().from_string(setup["source"]))
        return {"ready": True}

    def render(line: bytes) -> dict[str, Any]:
        variables = {"tools": None, "documents": None, **setup["variables"], **json.loads(line)}
        return {"text": _bounded_text(template[0].generate(variables), bounds.output_bytes)}

    limit_memory(bounds.memory_bytes)
    send(replies, _guarded(compile_it, bounds.seconds))
    for line in requests:
        send(replies, _guarded(partial(render, line), bounds.seconds))


def _guarded(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Runs `work` with every failure as a reply, and ends the process if it takes too long."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    # The alarm's default action ends the process even inside C code. For a render the parent's timer does the
    # same; the alarm bounds compiling apart from the start, and a child whose parent has died.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work()
    except _Refused as error:
        return _problem("refused", str(error))
    except (SecurityError, TemplateSyntaxError) as error:
        return _problem("format", f"is not allowed or not valid: {error}")
    except (MemoryError, RecursionError) as error:
        return _problem("failed", f"it needs too much memory or recursion ({type(error).__name__})")
    except Exception as error:
        return _problem("failed", f"{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _problem(kind: str, problem: str) -> dict[str, Any]:
    return {"kind": kind, "problem": problem[:MAX_PROBLEM_CHARS]}


def _bounded_text(pieces: Any, limit: int) -> str:
    """Joins what a template yields; raises ValueError once it is more than `limit` bytes of UTF-8."""
    found, size = [], 0
    for piece in pieces:
        size += len(piece.encode())
        if size > limit:
            raise ValueError(f"its output is over {limit} bytes")
        found.append(piece)
    return "".join(found)


def _environment() -> Any:
    """Jinja as Hugging Face's templates expect it."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks an assistant's words for training; here it only passes them through."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    # Jinja's own tojson escapes for HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
