"""What drafters give and what they must not cost, on the demo models in bfloat16, greedy.

Shipped pair: `LLM(draft_model="demo-draft")` against the same LLM without it, beginnings of files of Python's standard
library, in turns. How much is drafted is the engine's own choice, so where proposals do not pay the ratio should be 1.
Two equal LLMs of one process differ, which no number of turns takes out. So all are started several times, the pair is
held against two LLMs without drafts, and how these two differ is shown beside it. The same pair that always drafts says
how much of it is kept, and what the engine's choice is worth.

Forced acceptance: one row; each proposal is kept with a given chance, whatever was proposed (what is said is nonsense,
what is computed is not), and all k are always made. Efficiency is the measured speed-up over what the tokens of a round
promise: their number over (time of such a round) / (time of a plain one), both from the same compiled loops.

Prompt lookup: `LLM(speculation="ngram")`, one row. Copies: the answer is forced to be the prompt's document again,
as it stands or with an edit every few tokens (the target computes what it computes; the demo's target does not copy).
Own text: what the target itself says after a file's beginning that begins again; it soon goes in circles.

Heads: `LLM(speculation="medusa")` with the shipped heads, one row, the prompts of the shipped pair.
"""

import math
import random
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import interleaved, is_quick, median_ratio, ratios
from jaxinfer import LLM, SamplingParams, sampling, speculative_step, startup
from jaxinfer.acceptance import keep, repeated
from jaxinfer.config import EngineConfig
from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.executor import Executor
from jaxinfer.loading import model_folder
from jaxinfer.noise import Use, first_largest, keys_for, uniform
from jaxinfer.round_clock import program_for
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import SamplerForm

PREFIX = 200
"""Characters of a file that are the prompt."""


@dataclass(frozen=True, slots=True)
class Size:
    """rows, rounds: of the shipped pair, and pairs of runs for each, with either of two plain LLMs, in every one of so
    many starts. output: tokens a row. drafted: most proposals. always: pairs of runs with the pair that always drafts.
    forced: chances and numbers of proposals; forced_rounds, forced_output: pairs of runs for each, and their tokens,
    many, as prefill is not what proposals speed up. copies, own_text: of prompt lookup. heads: pairs of runs with
    them. step_tokens: most tokens of a step; fewer are fewer programs.
    """

    target: str
    rows: tuple[int, ...]
    rounds: tuple[int, ...]
    starts: int
    output: int
    drafted: int
    always: int
    forced: tuple[tuple[float, int], ...]
    forced_rounds: int
    forced_output: int
    copies: int
    own_text: int
    heads: int
    step_tokens: int


FULL = Size("demo", (1, 4, 16, 64), (11, 11, 7, 7), 5, 128, 4, 9,
            tuple((chance, k) for chance in (0.6, 0.8) for k in (2, 4, 8)), 15, 320, 9, 21, 21, 256)  # fmt: skip
QUICK = Size("demo-draft", (1,), (1,), 1, 16, 2, 1, ((0.6, 2),), 1, 16, 1, 0, 0, 8)  # equal engines compile once


def new_llm(size: Size, num_rows: int, num_drafted: int = 0, speculation: str = "draft_model") -> LLM:
    by_model = num_drafted and speculation == "draft_model"
    return LLM(size.target, speculation=speculation if num_drafted else None,
               draft_model="demo-draft" if by_model else None,
               num_speculative_tokens=max(num_drafted, 1), dtype="bfloat16", max_num_seqs=num_rows,
               max_model_len=512, max_num_batched_tokens=max(size.step_tokens, num_rows),
               num_pages=max(num_rows, 2) * 32, enable_prefix_caching=False, quiet=True)  # fmt: skip


def beginnings(length: int = PREFIX) -> list[str]:
    """So many characters of every file of the standard library, in random order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(errors="replace")[:length] for file in files]
    random.Random(0).shuffle(texts)
    return texts


class Side:
    """An LLM that answers prompts, always the next ones."""

    def __init__(self, llm: LLM, output: int, prompts: list | None = None):
        self.llm = llm
        self._output = output
        self._texts = prompts or beginnings()
        self._next = 0

    def tokens_a_second(self, num_rows: int) -> float:
        prompts = [self._texts[(self._next + i) % len(self._texts)] for i in range(num_rows)]
        self._next += num_rows
        params = SamplingParams(temperature=0.0, max_tokens=self._output, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return num_rows * self._output / (time.perf_counter() - began)


def shipped(size: Size) -> list[Result]:
    compared = {"drafting": ("plain", "again"), "again": ("plain",)}
    found: dict[tuple[int, str], list[float]] = {(rows, name): [] for rows in size.rows for name in compared}
    counts: dict[int, Counter[int]] = {rows: Counter() for rows in size.rows}
    texts = beginnings()
    for start in range(size.starts):
        first = start * len(texts) // size.starts
        with ExitStack() as stack:
            drafted = {"plain": 0, "drafting": size.drafted, "again": 0}
            names = sorted(drafted, reverse=start % 2 == 1)  # the first that is made is not always the same
            llms = {name: stack.enter_context(new_llm(size, max(size.rows), drafted[name])) for name in names}
            sides = {name: Side(llms[name], size.output, texts[first:] + texts[:first]) for name in names}
            for rows, rounds in zip(size.rows, size.rounds, strict=True):
                before = llms["drafting"].metrics()
                for name, others in compared.items():
                    for other in others:
                        found[rows, name] += ratios_of(sides[name], sides[other], rows, rounds)
                counts[rows] += rounds_between(before, llms["drafting"].metrics())
    return [result for rows in size.rows for result in
            (Result(f"{rows} rows, drafting / plain", statistics.median(found[rows, "drafting"]), "x", 0.98,
                    better="higher"),
             Result(f"{rows} rows, a second plain / plain", statistics.median(found[rows, "again"]), "x"),
             *accepted(f"{rows} rows", counts[rows]))]  # fmt: skip


@contextmanager
def always_drafting(num_drafted: int) -> Iterator[list[Executor]]:
    """LLMs started inside make so many proposals in every round; gives their executors."""
    started: list[Executor] = []

    def lengths(executor: Executor, config: EngineConfig, say: Callable[[str], None]) -> DraftLengths:
        started.append(executor)
        return DraftLengths(num_drafted)

    with mock.patch.object(startup, "measured_drafts", lengths):
        yield started


def shipped_always(size: Size) -> list[Result]:
    """The shipped pair if nobody chose how much is drafted, up to 16 rows."""
    sizes = [rows for rows in size.rows if rows <= 16]
    with new_llm(size, max(sizes)) as plain, always_drafting(size.drafted), \
            new_llm(size, max(sizes), size.drafted) as drafting:  # fmt: skip
        return [one for rows in sizes for one in
                beside_plain(f"{rows} rows, always drafting", size.always, plain, drafting, beginnings(), size.output,
                             rows=rows)]  # fmt: skip


def ratios_of(side: Side, plain: Side, rows: int, rounds: int) -> list[float]:
    """Of so many pairs of runs, the side's rate over plain."""
    sides = {"plain": plain, "side": side}
    for each in sides.values():  # the first calls of a process are slower
        each.tokens_a_second(rows)
    rates = interleaved(rounds, {name: lambda each=each: each.tokens_a_second(rows) for name, each in sides.items()})
    return ratios(rates["side"], rates["plain"])


def rounds_between(before: dict, after: dict) -> Counter[int]:
    """Rounds that drafted between two snapshots, by proposals kept."""
    return Counter(after["rounds_by_accepted"]) - Counter(before["rounds_by_accepted"])


def accepted(name: str, counts: Counter[int]) -> list[Result]:
    """Of rounds that drafted: tokens of each, their number, and shares by proposals kept."""
    num_rounds = counts.total()
    tokens = sum((kept + 1) * count for kept, count in counts.items()) / max(num_rounds, 1)
    kept = [Result(f"{name}, kept {kept}", count / num_rounds, "of them", better="higher")
            for kept, count in sorted(counts.items())]  # fmt: skip
    return [Result(f"{name}, tokens a round that drafted", tokens, "", better="higher"),
            Result(f"{name}, rounds that drafted", num_rounds, "", better="higher"), *kept]  # fmt: skip


@contextmanager
def forced(chance: float, num_drafted: int) -> Iterator[list[Executor]]:
    """LLMs started inside keep each proposal with this chance and always make all; gives their executors."""

    def accept(logits, drafted, rows, positions, form):
        num_rows, width, vocab_size = logits.shape
        own = first_largest(logits.reshape(-1, vocab_size)).reshape(num_rows, width)
        every = positions[:, None] + jnp.arange(width - 1)
        keys = keys_for(Use.ACCEPTANCE, repeated(rows, width - 1).key)
        return keep(uniform(keys, every.reshape(-1)).reshape(every.shape) < chance, drafted, own)

    with mock.patch.object(speculative_step, "accept", accept), always_drafting(num_drafted) as started:
        yield started


def efficiency(size: Size, plain: Side, chance: float, num_drafted: int) -> list[Result]:
    with forced(chance, num_drafted) as executors, new_llm(size, 1, num_drafted) as llm:
        side = Side(llm, size.forced_output)

        def round_over_plain() -> float:  # between answers nothing runs, and no row is lost
            by_size = executors[0].measure_rounds()[SamplerForm.GREEDY]
            seconds = by_size[program_for(1, by_size)]
            return seconds.most / seconds.plain

        for each in (plain, side):
            each.tokens_a_second(1)
        before = llm.metrics()
        rates = interleaved(size.forced_rounds, {"plain": lambda: plain.tokens_a_second(1),
                                                 "drafting": lambda: side.tokens_a_second(1),
                                                 "a round over a plain one": round_over_plain})  # fmt: skip
        (tokens, *_) = accepted("", rounds_between(before, llm.metrics()))
    speedup = median_ratio(rates["drafting"], rates["plain"])
    cost = statistics.median(rates["a round over a plain one"])
    promised = (tokens.value or math.nan) / cost
    name = f"acceptance {chance}, {num_drafted} drafted"
    return [
        Result(f"{name}: efficiency", speedup / promised, "", 0.85, 0.95, "higher"),
        Result(f"{name}: drafting / plain", speedup, "x", better="higher"),
        Result(f"{name}: tokens a round", tokens.value, "", better="higher"),
        Result(f"{name}: a round over a plain one", cost, ""),
    ]


DOCUMENT, EVERY = 128, 16
"""Tokens of the document that is copied, and of each edit."""


@contextmanager
def saying(text: list[int]) -> Iterator[None]:
    """LLMs started inside say `text` by position, whatever they compute."""
    table = jnp.array(text, jnp.int32)

    def said(logits: jax.Array, positions: jax.Array) -> jax.Array:
        own = first_largest(logits.reshape(-1, logits.shape[-1])).reshape(positions.shape)
        return jnp.where(own >= 0, table.at[positions].get(mode="clip"), 0)  # always: but the head is computed

    def accept(logits, drafted, rows, positions, form):
        own = said(logits, positions[:, None] + jnp.arange(logits.shape[1]))
        return keep(drafted.tokens == own[:, :-1], drafted, own)

    with mock.patch.object(speculative_step, "accept", accept), \
            mock.patch.object(sampling, "sample", lambda logits, rows, positions, form: said(logits, positions)):
        yield


def with_edits(document: list[int], every: int) -> list[int]:
    """One token in so many is another one of the document."""
    draw = random.Random(0)
    return [draw.choice(document) if index % every == every - 1 else token for index, token in enumerate(document)]


def copying(size: Size, plain: LLM) -> list[Result]:
    """A copy, then a copy with edits behind both."""
    encode = Tokenizer.from_folder(model_folder(size.target)).encode
    document = encode("".join(whole_files()[:2]))[:DOCUMENT]
    text = [*document, *document, *with_edits(document, EVERY)]
    prompts = {"copies": text[:DOCUMENT], f"copies with an edit every {EVERY} tokens": text[:2 * DOCUMENT]}
    with saying(text), new_llm(size, 1, size.drafted, "ngram") as looking:
        return [one for name, prompt in prompts.items()
                for one in beside_plain(f"{name}: prompt lookup", size.copies, plain, looking, [prompt], size.output,
                                        (1.5, 2.5))]  # fmt: skip


def own_text(size: Size, plain: LLM) -> list[Result]:
    prompts = [f"{text[:3 * PREFIX]}\n\n{text[:PREFIX // 4]}" for text in whole_files()]
    if not size.own_text:
        return []
    with new_llm(size, 1, size.drafted, "ngram") as looking:
        return beside_plain("own text: prompt lookup", size.own_text, plain, looking, prompts, size.output)


def heads(size: Size, plain: LLM) -> list[Result]:
    if not size.heads:
        return []
    with new_llm(size, 1, size.drafted, "medusa") as drafting:
        return beside_plain("beginnings: heads", size.heads, plain, drafting, beginnings(), size.output)


def whole_files() -> list[str]:
    return [text for text in beginnings(4 * PREFIX) if len(text) == 4 * PREFIX]


def beside_plain(name: str, rounds: int, plain: LLM, drafting: LLM, prompts: list, output: int,
                 limits: tuple[float | None, float | None] = (None, None), rows: int = 1) -> list[Result]:  # fmt: skip
    """In turns with plain decoding. limits: floor and goal of the ratio."""
    sides = {"plain": Side(plain, output, prompts), "drafting": Side(drafting, output, prompts)}
    before = drafting.metrics()
    found = statistics.median(ratios_of(sides["drafting"], sides["plain"], rows, rounds))
    ratio = Result(f"{name} / plain", found, "x", *limits, "higher")
    return [ratio, *accepted(name, rounds_between(before, drafting.metrics()))]


def main() -> int:
    size = QUICK if is_quick(__doc__) else FULL
    results = shipped(size) + shipped_always(size)
    with new_llm(size, 1) as llm:
        plain = Side(llm, size.forced_output)
        results += copying(size, llm) + own_text(size, llm) + heads(size, llm)
        for chance, num_drafted in size.forced:
            results += efficiency(size, plain, chance, num_drafted)
    efficiencies = [result.value for result in results if result.name.endswith("efficiency") and result.value]
    results.append(Result("efficiency, median", statistics.median(efficiencies), "", better="higher"))
    report("speculation", results)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
