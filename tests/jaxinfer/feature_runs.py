"""Requests with features of the table, run through engines with the table model, and what each must answer."""

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from counting import small_config
from features import EOS, FIRST, LETTERS, SECOND, params_of
from lazy_programs import warm_up_lazily
from reference_sampler import VOCAB, TableModel, answer, by_table, candidates, is_over, table
from remote_drafting import Follower
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfer.assembly import Assembler, cancelled
from jaxinfer.draft_model import DraftModel
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.drafter import Drafter
from jaxinfer.engine import Engine
from jaxinfer.executor import Executor
from jaxinfer.intake import GenerationDefaults, Intake
from jaxinfer.medusa_drafter import MedusaDrafter
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.page_pool import PagePool
from jaxinfer.prompt_lookup import PromptLookup
from jaxinfer.remote_drafts import RemoteDrafts, num_ahead
from jaxinfer.remote_proposals import RemoteProposals
from jaxinfer.scheduler import Scheduler
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import Request, RequestStats, SamplingParams, StepPlan
from jaxinfer.validation import Limits, stop_strings

CONFIG = small_config(max_num_seqs=8, num_pages=190, row_buckets=(8,), max_decode_rounds=3, grammars=True)
DRAFTED = 3
DRAFTERS = ("none", "draft model", "prompt lookup")
"""With which every pair runs."""
MORE_DRAFTERS = ("Medusa", "remote drafter")
"""With which every feature runs alone."""


@dataclass(frozen=True)
class TableHeads:
    """Heads of the table model: a state is the token whose row of the table gives the logits; sometimes another."""

    def advance(self, params: Any, index: int, state: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.where(tokens % 3 == 0, (tokens + 1) % VOCAB, tokens)[:, None].astype(jnp.float32)


def letter_tokenizer_json() -> str:
    """tokenizer.json: an id a letter, the last one is end-of-sequence."""
    backend = Backend(models.BPE(vocab={letter: id_ for id_, letter in enumerate(LETTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return backend.to_str()


def letter_tokenizer() -> Tokenizer:
    return Tokenizer.from_json(letter_tokenizer_json(), {"eos_token": "<eos>"})


def new_intake() -> Intake:
    limits = Limits(vocab_size=EOS + 1, max_model_len=CONFIG.max_model_len)
    return Intake(letter_tokenizer(), limits, GenerationDefaults(SamplingParams(), (EOS,)), seeds=random.Random(0))


def new_drafter(name: str) -> Drafter:
    rows = CONFIG.max_num_seqs
    if name == "draft model":
        return DraftModel(TableModel(every=3), DRAFTED)
    if name == "prompt lookup":
        return PromptLookup(DRAFTED, rows, CONFIG.max_model_len)
    if name == "Medusa":
        return MedusaDrafter(TableModel(), TableHeads(), DRAFTED, rows, 1, jnp.float32)
    return RemoteProposals(DRAFTED, num_ahead(DRAFTED), rows)


def new_executor(drafter: str) -> Executor:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.device_put(np.float32(0), place)
    model, config = TableModel(), CONFIG
    if drafter != "none":
        model = DraftPair(model, new_drafter(drafter))
        config = dataclasses.replace(config, num_speculative_tokens=DRAFTED)
        params = Pair(params, params if drafter == "draft model" else ())
    made = Executor(model, params, config, place)
    warm_up_lazily(made)
    return made


def new_remote(executor: Executor) -> RemoteDrafts | None:
    """The source of proposals, where they come from outside."""
    drafter = getattr(executor.signature.model, "drafter", None)
    if not isinstance(drafter, RemoteProposals):
        return None
    return RemoteDrafts(Follower(table(0).argmax(1).tolist()), VOCAB, drafter.num_kept)


@dataclass
class Run:
    """What one engine answered. plans: of all steps. stats: of each request's samples, some twice."""

    outputs: dict[str, RequestOutput]
    plans: list[StepPlan]
    stats: dict[str, list[RequestStats]]
    engine: Engine


def run(executor: Executor, tokenizer: Tokenizer | None, batches: Iterable[list[Request]], num_pages: int = 190) -> Run:
    """The batches one after the other through one engine. num_pages: how many of the pool's pages there are."""
    executor.reset()
    config = dataclasses.replace(executor.config, num_pages=num_pages)
    engine = Engine(executor, Scheduler(config, PagePool(num_pages, config.page_size)), remote=new_remote(executor))
    found = Run({}, record_plans(engine), defaultdict(list), engine)
    for batch in batches:
        run_batch(found, tokenizer, batch)
    assert engine.scheduler.pool.num_held == 0
    assert engine.scheduler.metrics.failed_steps == 0
    return found


def run_batch(found: Run, tokenizer: Tokenizer | None, batch: list[Request]) -> None:
    """What the engine answers to requests that come at once, into `found`."""
    engine, assemblers = found.engine, {one.id: Assembler(one, tokenizer) for one in batch}
    for one in batch:
        engine.add(one)
    while engine.has_work:
        for chunk in engine.step():
            if chunk.stats is not None:
                found.stats[chunk.request_id].append(chunk.stats)
            for index in cancelled([assemblers[chunk.request_id].feed(chunk)]):
                engine.cancel(chunk.request_id, index)
        engine.scheduler.check_invariants()
    found.outputs |= {id_: assembler.output() for id_, assembler in assemblers.items()}


def record_plans(engine: Engine) -> list[StepPlan]:
    plans, dispatch = [], engine.scheduler.plan

    def plan(**options):
        made = dispatch(**options)
        plans.extend([made] if made else [])
        return made

    engine.scheduler.plan = plan  # type: ignore[method-assign]
    return plans


def request_of(intake: Intake, names: tuple[str, ...], seed: int, *, length: int = 6, **more: Any) -> Request:
    """With these features, and a prompt of letters that follows from `seed`."""
    prompt = random.Random(seed).choices(range(len(LETTERS)), k=length)
    found = intake.request(prompt, SamplingParams(**params_of(*names, seed=seed) | more),
                           request_id=f"{' x '.join(names)} {seed} {length}")
    return dataclasses.replace(found, seed=seed)  # also of one that brought none


def spelt(said: list[int]) -> str:
    return "".join(LETTERS[id_] for id_ in said if id_ != EOS)


def legal(said: list[int]) -> set[int]:
    """What `features.PATTERN` allows."""
    letters = SECOND if len(said) % 2 else FIRST
    return {LETTERS.index(letter) for letter in letters} | ({EOS} if said and not len(said) % 2 else set())


def wanted(request: Request, index: int = 0) -> list[int]:
    return answer(request, index, legal if request.grammar else None, spell_of(request))[0]


def spell_of(request: Request):
    return spelt if stop_strings(request.params) else None


def check(request: Request, output: RequestOutput, *, exact: bool = True) -> None:
    """Raises AssertionError unless the output is the one wanted; where not `exact`, one that could be."""
    assert len(output.outputs) == request.params.n
    for sample in output.outputs:
        tokens = list(sample.token_ids)
        if exact:
            assert tokens == wanted(request, sample.index)
        check_possible(request, tokens)
        check_text(request, sample)
        if request.params.logprobs is not None:
            context = [*request.prompt, *tokens]
            check_scores(sample.logprobs, tokens, context[len(request.prompt) - 1:], request.params.logprobs)
        else:
            assert sample.logprobs is None
    if request.params.prompt_logprobs is not None:
        nothing, *scores = output.prompt_logprobs or []
        assert nothing is None
        check_scores(scores, request.prompt[1:], request.prompt, request.params.prompt_logprobs)
    else:
        assert output.prompt_logprobs is None


def check_possible(request: Request, tokens: list[int]) -> None:
    """Each token has a probability where it stands, and the output ends where it must, not earlier or later."""
    allowed = legal if request.grammar else None
    for count, token in enumerate(tokens):
        said = tokens[:count]
        assert not is_over(request, said, allowed, spell_of(request))
        assert candidates(by_table([*request.prompt, *said]), request, said, allowed)[token] > -np.inf
    assert is_over(request, tokens, allowed, spell_of(request))


def check_text(request: Request, sample: CompletionOutput) -> None:
    """Text and reason follow from the tokens."""
    tokens = list(sample.token_ids)
    ended = tokens[-1] in request.stop_ids
    text = spelt(tokens[:-1] if ended else tokens)
    matches = [] if ended else [stop for stop in stop_strings(request.params) if text.endswith(stop)]
    stop = max(matches, key=len) if matches and len(tokens) > request.params.min_tokens else ""
    assert sample.text == (text.removesuffix(stop) if request.params.detokenize else "")
    assert sample.finish_reason == ("stop" if ended or stop else "length")
    assert sample.stop_reason == (stop or (tokens[-1] if ended and tokens[-1] != EOS else None))


def check_scores(entries, tokens, before, count: int) -> None:
    """Log-probabilities are the model's own, before any rule; the likeliest come with them."""
    assert len(entries) == len(tokens)
    for entry, token, last in zip(entries, tokens, before, strict=False):
        logits = by_table([last]).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        likeliest = np.argsort(-logits)
        assert next(iter(entry)) == token and set(entry) == {token, *likeliest[:count].tolist()}
        assert all(abs(one.logprob - exact[id_]) < 1e-5 for id_, one in entry.items())
        assert entry[token].rank == likeliest.tolist().index(token) + 1
