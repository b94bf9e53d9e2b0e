"""Does constrained output keep its word on any schema, and do its masks hide behind the device's work?

1,000 JSON schemas at random (`json_schemas`), one request each, at temperature 1 on the demo model, 64 rows at once.
Each ends in one of four ways: JSON that an independent validator accepts, a refusal that names the field, an output
that max_tokens cut (the tokens so far are then checked to be a legal beginning), or an invalid one, of which there may
be none.

While the device computes a step's hidden states, the host makes the masks of its rows. Both begin when the tokens of
the step before have been read; masks that take no longer than the hidden states cost no time. Counted are the steps
that are nearly full of rows with a grammar.
"""

import json
import queue
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator, ValidationError

from benchmarks.json_schemas import schemas
from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import is_quick
from jaxinfer import LLM, InvalidRequest, SamplingParams, StructuredOutput
from jaxinfer.assembly import Assembler
from jaxinfer.engine import Engine, StepRunner
from jaxinfer.errors import GrammarFailed
from jaxinfer.executor import InFlight
from jaxinfer.types import Request, StepPlan, StepResult, TokenChunk

type Schema = dict[str, Any]
type Asked = tuple[Schema, Request | InvalidRequest]
"""A schema and its request, or what was said against it."""

PROMPT = "value = "
VALID, REFUSED, CUT, INVALID = "valid JSON", "refused by name", "cut by max_tokens, a legal beginning", "invalid"
FULL_SHARE = 0.75
"""Of the most rows with a grammar that any step had: steps with fewer are not timed."""


@dataclass(frozen=True, slots=True)
class Size:
    num_schemas: int
    max_tokens: int
    options: dict[str, Any]


FULL = Size(1000, 1024, {"model": "demo", "max_num_seqs": 64, "max_model_len": 1088, "max_num_batched_tokens": 256})
QUICK = Size(12, 48, {"model": "demo-draft", "max_num_seqs": 2, "max_model_len": 128, "max_num_batched_tokens": 8})


def drawn(count: int) -> list[Schema]:
    """So many, no two alike; the same as long as this code and hypothesis are."""
    found: dict[str, Schema] = {}

    @settings(max_examples=3 * count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(schemas())
    def note(schema: Schema) -> None:
        found.setdefault(json.dumps(schema), schema)

    note()
    if len(found) < count:
        raise RuntimeError(f"only {len(found)} of {count} schemas differ")
    return list(found.values())[:count]


@dataclass(slots=True)
class Clocked:
    """A StepRunner, and the maker of masks, that note when each part of a constrained step was done.

    steps: rows with a grammar, seconds of their masks, seconds from the tokens read to the hidden states.
    """

    runner: StepRunner
    masks: Any
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    read_at: float = 0.0
    masked: tuple[int, float] = (0, 0.0)

    def dispatch(self, plan: StepPlan) -> InFlight:
        return self.runner.dispatch(plan)

    def of(self, plan: StepPlan, rows: list[Any], shape: tuple[int, ...], proposed: list[list[int]] | None
           ) -> tuple[np.ndarray, dict[int, GrammarFailed]]:
        began = time.perf_counter()
        found = self.masks.of(plan, rows, shape, proposed)
        self.masked = sum(seq.matcher is not None for seq in rows), time.perf_counter() - began
        return found

    def proposed(self, step: InFlight) -> list[list[int]] | None:
        return self.runner.proposed(step)

    def is_ready(self, step: InFlight) -> bool:
        return self.runner.is_ready(step)

    def sample(self, step: InFlight, masks: np.ndarray) -> None:
        if step.unfinished is not None:
            jax.block_until_ready(step.unfinished.arguments)
        if not any(step.plan.tokens):  # decode rows alone
            self.steps.append((*self.masked, time.perf_counter() - self.read_at))
        self.runner.sample(step, masks)

    def read(self, step: InFlight) -> StepResult:
        result = self.runner.read(step)
        self.read_at = time.perf_counter()
        return result

    def reset(self) -> None:
        self.runner.reset()

    def full_steps(self) -> list[tuple[int, float, float]]:
        most = max(rows for rows, _, _ in self.steps)
        return [step for step in self.steps if step[0] >= FULL_SHARE * most]


def clocked(engine: Engine) -> Clocked:
    """The engine's own runner and masks from now on, with clocks."""
    found = Clocked(engine.runner, engine._masks)
    engine.runner, engine._masks = found, found  # pyright: ignore[reportAttributeAccessIssue]
    return found


class Inbox(queue.SimpleQueue[list[TokenChunk]]):
    """A Consumer."""

    def deliver(self, chunks: list[TokenChunk]) -> None:
        self.put(chunks)


def requests(llm: LLM, wanted: Iterable[Schema], max_tokens: int) -> Iterator[Asked]:
    """Of each schema."""
    for seed, schema in enumerate(wanted):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens,
                                structured_outputs=StructuredOutput(json=schema))  # fmt: skip
        try:
            yield schema, llm.core.intake.request(PROMPT, params)
        except InvalidRequest as error:
            yield schema, error


def endings(llm: LLM, asked: Sequence[Asked]) -> Counter[str]:
    """How many ended in which way; refusals and invalid outputs are printed."""
    found: Counter[str] = Counter()
    running: dict[str, tuple[Schema, Assembler]] = {}
    inbox = Inbox()
    for schema, request in asked:
        if isinstance(request, InvalidRequest):
            print(f"refused: {str(request)[:160]}", file=sys.stderr)
            found[REFUSED if request.field.startswith("structured_outputs") else INVALID] += 1
        else:
            running[request.id] = schema, Assembler(request, llm.core.tokenizer)
            llm.core.engine.submit(request, inbox)
    while running:
        for chunk in inbox.get():
            schema, assembler = running[chunk.request_id]
            assembler.feed(chunk)
            if chunk.finish_reason is not None:
                del running[chunk.request_id]
                found[ending(schema, assembler, chunk)] += 1
    return found


def ending(schema: Schema, assembler: Assembler, last: TokenChunk) -> str:
    sample = assembler.output().outputs[0]
    if isinstance(last.error, GrammarFailed):
        return REFUSED
    try:
        if last.finish_reason == "length":
            return CUT if is_legal(assembler.request, sample.token_ids) else INVALID
        Draft202012Validator(schema).validate(json.loads(sample.text))
    except (ValueError, ValidationError) as error:
        print(f"invalid: {json.dumps(schema)} gave {sample.text!r}: {str(error)[:200]}", file=sys.stderr)
        return INVALID
    return VALID if last.finish_reason == "stop" else INVALID


def is_legal(request: Request, tokens: list[int]) -> bool:
    """Whether the tokens are the beginning of a legal output."""
    if request.grammar is None:
        return False
    try:
        request.grammar.matcher().advance(tokens)
    except GrammarFailed:
        return False
    return True


def main() -> int:
    size = QUICK if is_quick(__doc__) else FULL
    with LLM(**size.options, dtype="bfloat16", quiet=True) as llm:
        clock = llm.core.engine.run(clocked)
        began = time.perf_counter()
        asked = list(requests(llm, drawn(size.num_schemas), size.max_tokens))
        compiled = time.perf_counter()
        ended = endings(llm, asked)
        ran = time.perf_counter()
    steps = clock.full_steps()
    masks, hidden = (statistics.median(step[part] for step in steps) for part in (1, 2))
    found = [
        Result(INVALID, ended[INVALID], "outputs", floor=0, goal=0),
        *(Result(name, ended[name], "requests") for name in (VALID, REFUSED, CUT)),
        Result("rows with a grammar in a full step", statistics.median(rows for rows, _, _ in steps), "rows"),
        Result("masks, a full step", masks * 1e3, "ms"),
        Result("hidden states, the same steps", hidden * 1e3, "ms"),
        Result("masks / hidden states", statistics.median(step[1] / step[2] for step in steps), "x", 1.0, 0.25),
        Result("all requests, compiling", compiled - began, "s"),
        Result("all requests, running", ran - compiled, "s"),
    ]
    report("schemas", found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
