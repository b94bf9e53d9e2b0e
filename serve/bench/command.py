"""`jaxinfer bench serve`: prompts, a run, its figures."""

import asyncio
import gc
import json
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxinfer.core import ModelInfo
from jaxinfer.errors import InvalidConfig
from serve.bench import dataset, results
from serve.bench.arrivals import arrivals
from serve.bench.config import BenchConfig
from serve.bench.connection import Connections, connected, with_lengths
from serve.bench.open_loop import open_loop
from serve.bench.record import Record
from serve.bench.results import Run
from serve.bench.sender import Sender, messages
from serve.bench.speculation import Drafted, fetch, speculated
from serve.bench.table import table

FAILED = 1
SHOWN_ERRORS = 3


def run(config: BenchConfig) -> int:
    """Measures, shows and saves; returns the exit code. Raises InvalidConfig, OSError before anything is sent."""
    done, info, spoken = asyncio.run(measure(config))
    found = described(config, info) | results.results(done, config.metrics, config.percentiles, config.limits) | spoken
    show(config, done, found)
    save(config, done, found)
    return 0 if found["completed"] else FAILED


async def measure(config: BenchConfig) -> tuple[Run, ModelInfo, dict[str, Any]]:
    """What was seen, of which model, and what its server says of speculation."""
    in_file = [] if config.dataset == "random" else samples_of(config, None)
    async with connected(config) as (connections, info):
        samples = in_file or samples_of(config, info)
        requests = messages(config, samples, await with_lengths(connections, samples, config))
        warmups, requests = requests[:config.num_warmups], requests[config.num_warmups:]
        if warmups:
            note(f"warming up with {len(warmups)} requests")
            await warm(config, connections, warmups)
        before = await drafted(config, None)
        with progress(config) as on_end, undisturbed():
            sender = Sender(connections, requests, config.timeout, keep_text=config.save_detailed, on_end=on_end)
            done = await open_loop(
                arrivals(len(requests), config.request_rate, config.burstiness, config.seed), sender.send,
                max_concurrency=config.max_concurrency, closed=config.is_closed_loop)
        after = await drafted(config, before)
        spoken = speculated(before, after) if before and after else {}
        if after and not spoken:
            note("the server's metrics show no proposals of speculation in this run")
        return done, info, spoken


def samples_of(config: BenchConfig, info: ModelInfo | None) -> list[dataset.Sample]:
    """Warm-ups first. info: None for prompts of a file."""
    num = config.num_warmups + config.num_prompts
    if info is not None:
        return dataset.random_samples(config, info, num)
    samples = dataset.file_samples(config, num)
    distinct = len({id(sample) for sample in samples})
    if distinct < num:
        note(f"{config.dataset_path} has {distinct} prompts for {num} requests: they are repeated, and a prefix cache "
             "will have the repeated ones")
    return samples


async def warm(config: BenchConfig, connections: Connections, requests: Sequence[Any]) -> None:
    sender = Sender(connections, requests, config.timeout)
    await open_loop([0.0] * len(requests), sender.send, max_concurrency=config.max_concurrency)


async def drafted(config: BenchConfig, before: Drafted | None) -> Drafted | None:
    """None where no metrics were named. Raises InvalidConfig, but not behind a run, whose figures are worth more."""
    if config.metrics_url is None:
        return None
    try:
        return await asyncio.to_thread(fetch, config.metrics_url, config.tls_ca)
    except InvalidConfig as error:
        if before is None:
            raise
        note(f"nothing is known of speculation: {error}")
        return before


@contextmanager
def progress(config: BenchConfig):
    """Yields what is told of each request that has ended."""
    from tqdm.auto import tqdm

    failed = 0
    with tqdm(total=config.num_prompts, desc="requests", unit="request", disable=config.disable_tqdm,
              mininterval=0.25) as bar:
        def on_end(record: Record) -> None:
            nonlocal failed
            failed += not record.completed
            if not record.completed:
                bar.set_postfix(failed=failed, refresh=False)
            bar.update()

        yield on_end


@contextmanager
def undisturbed():
    """What is there already is not looked through again by the garbage collector, whose pauses would be measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def described(config: BenchConfig, info: ModelInfo) -> dict[str, Any]:
    """What was measured: the first keys of the result."""
    endless = config.request_rate == float("inf")
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "jaxinfer-grpc",
        "endpoint_type": "jaxinfer-grpc",
        "label": None,
        "model_id": info.name,
        "tokenizer_id": info.name,
        "num_prompts": config.num_prompts,
        "request_rate": "inf" if endless else config.request_rate,
        "burstiness": "inf" if config.burstiness == float("inf") else config.burstiness,
        "max_concurrency": config.max_concurrency,
        "seed": config.seed,
        "dataset_name": config.dataset,
        "latency_from": "sending" if config.is_closed_loop else "scheduled arrival",
    }


def show(config: BenchConfig, done: Run, found: dict[str, Any]) -> None:
    failed = [record for record in done.records if not record.completed]
    for status, error in list(dict.fromkeys((record.status, record.error) for record in failed))[:SHOWN_ERRORS]:
        note(f"failed: {status}: {error}")
    print(json.dumps(found) if config.json else table(found, config.metrics, config.percentiles), flush=True)
    if warning := results.distrust(done):
        note(f"warning: {warning}")


def save(config: BenchConfig, done: Run, found: dict[str, Any]) -> None:
    if config.save_result is not None:
        details = results.detailed(done.records) if config.save_detailed else {}
        Path(config.save_result).write_text(json.dumps(found | details), encoding="utf-8")
        note(f"wrote {config.save_result}")
    if config.plot is not None:
        from serve.bench.plot import plot

        Path(config.plot).write_text(plot(done.records, found), encoding="utf-8")
        note(f"wrote {config.plot}")


def note(text: str) -> None:
    """Beside the result, which is the standard output."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)
