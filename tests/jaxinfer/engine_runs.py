"""Engines of the second feature table: started as users start them, each with several features at once, and one small
mix of requests that shows all of these.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from feature_runs import Run, letter_tokenizer_json, record_plans, run_batch
from features import ENGINES, EOS, FIRST, LETTERS, SECOND
from lazy_programs import warm_up_lazily
from letters_model import following, write_heads, write_model
from remote_drafting import Follower

from jaxinfer import LLM, SamplingParams, draft_client, startup
from jaxinfer.engine import Engine
from jaxinfer.types import Request, StructuredOutput

SMALL = {"dtype": "float32", "max_num_seqs": 3, "max_model_len": 48, "page_size": 8, "max_decode_rounds": 3,
         "num_speculative_tokens": 3, "quiet": True}  # fmt: skip
EVERYWHERE = ("chunked prefill", "prefix cache", "preemption")
WITH_GRAMMAR = ("int8 weights", "int8 pages", "tensor parallel", "constrained output")
"""All steps are rounds in two halves."""
STARTS: tuple[tuple[str, ...], ...] = (
    ("draft model", *WITH_GRAMMAR), ("prompt lookup", *WITH_GRAMMAR),
    ("Medusa", *WITH_GRAMMAR), ("remote drafter", *WITH_GRAMMAR),
    ("draft model", "fp8 pages"), ("Medusa", "fp8 pages"), ("remote drafter", "fp8 pages"),
    ("prompt lookup", "fp8 pages", "int8 weights", "tensor parallel", "constrained output"),
)  # fmt: skip
"""What each engine has beside EVERYWHERE; together every pair that works."""
SHARE = 0.05
"""Of the target's layer: it changes every other token, and about every third proposal is right."""
LONG, SHORT = 24, 8
"""Tokens of outputs."""
PAIRED = f"([{FIRST}][{SECOND}]){{{LONG // 2}}}"


@dataclass(frozen=True)
class Answers:
    """What one engine said. logits: f32[n, V] of each request's prompt and output. num_devices: that the pages
    lie on.
    """

    found: Run
    requests: list[Request]
    logits: dict[str, np.ndarray]
    num_devices: int


@dataclass(frozen=True)
class Folders:
    """names: by those in `features.ENGINES`."""

    target: str
    names: dict[str, str]

    @classmethod
    def written(cls, folder: Path) -> "Folders":
        target = write_model(folder / "target", SHARE, letter_tokenizer_json())
        draft, heads = write_model(folder / "draft", 0.4 * SHARE), write_heads(folder / "heads")
        return cls(target, {"draft": draft, "heads": heads})

    @contextmanager
    def started(self, *features: str) -> Iterator[LLM]:
        """An engine with these features. Nothing is measured, and programs are compiled when called."""
        options = {name: self.names.get(value, value) for name, value in options_of(*features).items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(startup, "warm_up", lambda executor, show: warm_up_lazily(executor) or 0)
            patch.setattr(startup, "measured_drafts", lambda *_: None)
            proposed = following("constrained output" in features)
            patch.setattr(draft_client, "DraftClient", lambda address, kept, candidates: Follower(proposed))
            with LLM(self.target, **SMALL | options) as llm:
                yield llm


def options_of(*features: str) -> dict[str, Any]:
    return {name: value for feature in features for name, value in ENGINES[feature].items()}


def answers_of(folders: Folders, features: tuple[str, ...]) -> Answers:
    with folders.started(*EVERYWHERE, *features) as llm:
        requests = mix(llm, "constrained output" in features)
        found = llm.core.engine.run(lambda engine: run_mix(engine, llm, requests))
        logits = {one.id: llm.logits(text_of(one, found)) for one in requests}
        (pages, *_) = jax.tree.leaves(llm._executor.signature.state.kv_pages)
        return Answers(found, requests, logits, len(pages.sharding.device_set))


def text_of(one: Request, found: Run) -> list[int]:
    return [*one.prompt, *found.outputs[one.id].outputs[0].token_ids]


def mix(llm: LLM, constrained: bool) -> list[Request]:
    """Two long outputs and between them a short one, whose prompt begins like the first. Where output is constrained
    the long ones are, so that each step asks a grammar; then the short one has a seed.
    """
    rng = random.Random(3)
    first, second = rng.choices(range(EOS), k=20), rng.choices(range(EOS), k=20)
    shape = StructuredOutput(regex=PAIRED) if constrained else None
    long = SamplingParams(temperature=0.0, max_tokens=LONG, structured_outputs=shape, ignore_eos=not constrained)
    short = SamplingParams(temperature=0.9 if constrained else 0.0, seed=5, max_tokens=SHORT, ignore_eos=True)
    given = [(first, long), (first[:16] + second[:4], short), (second, long), (first[:7], long)]
    return [llm.core.intake.request(prompt, params, request_id=str(index))
            for index, (prompt, params) in enumerate(given)]


def run_mix(engine: Engine, llm: LLM, requests: list[Request]) -> Run:
    found = Run({}, record_plans(engine), defaultdict(list), engine)
    for batch in (requests[:3], requests[3:]):
        run_batch(found, llm.core.tokenizer, batch)
    return found


def legal(said: list[int]) -> set[int]:
    """What PAIRED allows."""
    return {LETTERS.index(letter) for letter in (SECOND if len(said) % 2 else FIRST)}
