"""A client that nobody here wrote: the gateway `smg` in front of our servers, asked through the `openai` client."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from counting_engine import CountingEngine, make_core, write_tokenizer
from serving import Served, eventually, serving

pytest.importorskip("smg_grpc_proto", reason="needs smg-grpc-proto")
pytest.importorskip("smg", reason="needs the gateway smg")
pytest.importorskip("openai", reason="needs the openai client")

import openai

from serve import smg_demo
from serve.gateway import Gateway, GatewayFailed, arguments, gateway
from serve.smg_demo import OpenAI

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a stack?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@contextlib.contextmanager
def fronted(*served: Served, **options: str) -> Iterator[tuple[Gateway, OpenAI]]:
    with gateway([one.server.address for one in served], options=options) as front, \
            contextlib.closing(OpenAI(front.url)) as api:
        api.find_model()
        yield front, api


# ---- the OpenAI API over a real model


@pytest.fixture(scope="module")
def model() -> Iterator[Served]:
    from jaxinfer import LLM

    llm = LLM("demo-draft", dtype="float32", max_num_seqs=2, max_model_len=256, max_num_batched_tokens=64, num_pages=32,
              compile_cache="off", quiet=True)  # fmt: skip
    with serving(llm.core) as served:  # it closes the core
        yield served


@pytest.fixture(scope="module")
def api(model: Served) -> Iterator[OpenAI]:
    with fronted(model) as (_, api):
        yield api


def test_what_the_demo_shows(api: OpenAI):
    lines: list[str] = []
    smg_demo.show_api(api, lines.append)
    assert [line[:14].strip() for line in lines] == [
        "models", "chat", "chat, stream", "completion", "stop string", "JSON schema"]
    assert lines[0].split() == ["models", "demo-draft"]


def test_a_chat_is_templated_and_tokenised_as_here(model: Served, api: OpenAI):
    wanted = model.client.generate(QUESTION, max_tokens=20, temperature=0)
    answer = api.client.chat.completions.create(model=api.model, messages=QUESTION, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        wanted.usage.prompt_tokens, wanted.usage.output_tokens)


def test_a_chat_streams(api: OpenAI):
    whole = api.client.chat.completions.create(model=api.model, messages=QUESTION, max_tokens=20, temperature=0)
    parts = list(api.client.chat.completions.create(model=api.model, messages=QUESTION, max_tokens=20, temperature=0,
                                                    stream=True, stream_options={"include_usage": True}))
    texts = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert len([text for text in texts if text]) > 1
    assert "".join(texts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[-1].usage.completion_tokens == 20


def test_completions_and_stop_strings(model: Served, api: OpenAI):
    prompt = "class Stack:\n"
    wanted = model.client.generate(prompt, max_tokens=24, temperature=0)
    found = api.complete(prompt, max_tokens=24, temperature=0).choices[0]
    assert (found.text, found.finish_reason) == (wanted.text, "length")
    stop = wanted.text[len(wanted.text) // 2:][:4]
    for stream in (False, True):
        answer = api.complete(prompt, max_tokens=24, temperature=0, stop=[stop], stream=stream)
        choices = [part.choices[0] for part in answer] if stream else answer.choices
        assert "".join(one.text for one in choices) == wanted.text[:wanted.text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_samples_seeds_and_log_probabilities(model: Served, api: OpenAI):
    wanted = model.client.generate(QUESTION, max_tokens=3, seed=7, temperature=1.0, n=2, logprobs=2)
    answer = api.client.chat.completions.create(model=api.model, messages=QUESTION, max_tokens=3, seed=7, n=2,
                                                temperature=1, logprobs=True, top_logprobs=2)
    for choice, sample in zip(answer.choices, wanted.samples, strict=True):
        assert choice.message.content == sample.text
        for here, there in zip(sample.logprobs, choice.logprobs.content, strict=True):
            assert there.logprob == pytest.approx(here.logprob, abs=1e-5)
            assert [one.logprob for one in there.top_logprobs] == pytest.approx(
                [one.logprob for one in here.top], abs=1e-5)


def test_a_json_schema_binds_the_answer(api: OpenAI):
    schema = {"type": "object", "required": ["name", "tags"], "additionalProperties": False,
              "properties": {"name": {"type": "string", "maxLength": 8},
                             "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}}}
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = api.chat("A thing?", max_tokens=100, temperature=1, seed=seed, response_format=form).choices[0]
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.message.content), schema)


@pytest.mark.parametrize(("options", "words"), [
    ({"max_tokens": 1000}, ["max_tokens", "1000", "256"]),
    ({"temperature": 2.5}, ["temperature"]),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}}, ["type"]),
])
def test_a_bad_field_is_the_callers(api: OpenAI, options: dict, words: list[str]):
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat("hi", **options)
    assert all(word in str(caught.value) for word in words)


# ---- load, with one server or two that count


def texts_of(answer: Any) -> str:
    return answer.choices[0].text


def test_an_overload_is_429_and_what_waits_is_answered(folder: Path):
    engine = CountingEngine(pace=0.001, max_waiting=4)
    with serving(make_core(engine, folder=folder)) as served, fronted(served) as (_, api), \
            ThreadPoolExecutor(12) as pool:
        engine.paused = True
        calls = [pool.submit(api.complete, "ab", max_tokens=3, stream=i % 2 == 0) for i in range(12)]
        eventually(lambda: sum(call.done() for call in calls) >= 8, timeout=20)
        refused = [call.exception() for call in calls if call.done()]
        assert len(engine.rows) == 4 and len(refused) == 8
        for error in refused:
            assert isinstance(error, openai.RateLimitError) and "the limit is 4" in str(error)
        engine.paused = False
        for call in calls:
            if call.exception(timeout=10) is None:
                answer = call.result()
                parts = answer.choices if hasattr(answer, "choices") else [part.choices[0] for part in answer]
                assert "".join(part.text for part in parts) == "cde"


def test_more_at_once_than_http2_usually_allows_a_connection(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The gateway has one connection to a server: what the queue has no place for is refused and not held back on it,
    and the gateway's health checks go on."""
    checks = counting_health_checks(monkeypatch)
    engine = CountingEngine(pace=0.001, max_waiting=270)
    with serving(make_core(engine, folder=folder)) as served, \
            fronted(served, **{"health-check-interval-secs": "1"}) as (front, api), ThreadPoolExecutor(1) as pool:
        engine.paused = True
        answers = pool.submit(asyncio.run, ask_at_once(front.url, api.model, 300))
        eventually(lambda: len(engine.rows) == 270, timeout=20)
        eventually(lambda: served.server.served.calls.ended["RESOURCE_EXHAUSTED"] >= 30, timeout=20)
        before = len(checks)
        eventually(lambda: len(checks) >= before + 2, timeout=10)
        assert [worker["is_healthy"] for worker in front.workers()] == [True]
        engine.paused = False
        assert Counter(answers.result(timeout=60)) == {"cde": 270, "429": 30}


def counting_health_checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The gateway's, as they arrive, of servers that are started from now on."""
    from serve.vllm_service import VllmService

    found: list[Any] = []
    check = VllmService.HealthCheck

    async def noted(self: VllmService, request: Any, context: Any) -> Any:
        found.append(request)
        return await check(self, request, context)

    monkeypatch.setattr(VllmService, "HealthCheck", noted)
    return found


async def ask_at_once(url: str, model: str, count: int) -> list[str]:
    """The texts of so many completions that run at the same time, or the statuses that they were refused with."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        async def ask() -> str:
            try:
                return texts_of(await client.completions.create(model=model, prompt="ab", max_tokens=3))
            except openai.APIStatusError as error:
                return str(error.status_code)

        return await asyncio.gather(*(ask() for _ in range(count)))


def wished(engine: CountingEngine) -> list[float]:
    """The temperatures of the requests that arrive there, from now on."""
    found: list[float] = []
    submit = engine.submit

    def noted(request: Any, consumer: Any) -> None:
        found.append(request.params.temperature)
        submit(request, consumer)

    engine.submit = noted  # type: ignore[method-assign]
    return found


def test_the_gateway_fills_in_what_the_model_wishes_for(folder: Path):
    engine = CountingEngine(pace=0.001)
    with serving(make_core(engine, folder=folder)) as served, fronted(served) as (_, api):
        found = wished(engine)
        api.complete("ab", max_tokens=3)
        api.complete("ab", max_tokens=3, temperature=0)
        assert found == [pytest.approx(0.7), 0.0]


def test_a_client_that_leaves_frees_its_row(folder: Path):
    engine = CountingEngine(pace=0.01)
    with serving(make_core(engine, folder=folder)) as served, fronted(served) as (_, api):
        stream = api.complete("ab", max_tokens=100_000, stream=True)
        next(iter(stream))
        assert len(engine.rows) == 1
        stream.close()
        eventually(lambda: not engine.rows)


def noting(engine: CountingEngine) -> list[str]:
    """The prompts that arrive there, from now on."""
    prompts: list[str] = []
    submit = engine.submit

    def noted(request: Any, consumer: Any) -> None:
        prompts.append(bytes(request.prompt).decode())
        submit(request, consumer)

    engine.submit = noted  # type: ignore[method-assign]
    return prompts


def test_prompts_that_begin_alike_go_to_one_server_and_others_take_over(folder: Path):
    cores = [make_core(CountingEngine(pace=0.002), folder=folder) for _ in range(2)]
    with serving(cores[0]) as one, serving(cores[1]) as other, fronted(one, other) as (front, api):
        seen = noting(one.engine), noting(other.engine)
        beginnings = [f"{letter}: the beginning of many prompts. " * 4 for letter in "ABCDEFGHIJKL"]

        def ask(number: int) -> str:
            return texts_of(api.complete(f"{beginnings[number % 12]}{number}a", max_tokens=4))

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, range(96))) == ["bcde"] * 96
        shares = [Counter(prompt[0] for prompt in prompts) for prompts in seen]
        assert not shares[0].keys() & shares[1].keys()  # each family went to one server
        assert all(shares) and shares[0] + shares[1] == dict.fromkeys("ABCDEFGHIJKL", 8)
        other.call(other.server.stop())  # as on SIGTERM: new calls are refused, the gateway asks the one that is left
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, range(24))) == ["bcde"] * 24
        assert len(front.workers()) == 2


def test_a_server_killed_under_load(folder: Path, repository: Path, monkeypatch: pytest.MonkeyPatch):
    """Every request is answered, or, where its stream had begun on that server, ends with an error event."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]))
    script = str(Path(__file__).with_name("serve_counting.py"))
    with smg_demo.servers((sys.executable, script, "0", "5", "0", str(folder)), 2) as started, \
            gateway([address for _, address in started]) as front, contextlib.closing(OpenAI(front.url)) as api:
        api.find_model()
        victim, _ = started[0]
        prompts = [f"{letter}{'abc' * 30}" for letter in "ABCDEFGH"]
        found = smg_demo.load(api, prompts, 96, 16, lambda ended: victim.kill() if ended == 20 else None, max_tokens=40)
        assert victim.wait(5) < 0
        kinds = Counter(one.kind for one in found)
        assert kinds.keys() <= {"answered", "error event"}, kinds
        assert kinds["error event"] <= 16 and kinds["answered"] >= 80  # streams that ran on the one that was killed
        after = smg_demo.load(api, prompts, 16, 8, lambda _: None, max_tokens=4)
        assert {one.kind for one in after} == {"answered"}


# ---- the process


def test_a_gateway_without_its_server_says_so():
    began = time.monotonic()
    with pytest.raises(GatewayFailed, match=r"did not see 1 servers within 1 s"), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gateway.wait_for, "__defaults__", (1.0,))
        with gateway(["127.0.0.1:1"]):
            pass
    assert time.monotonic() - began < 30


def test_a_gateway_that_does_not_start_says_so():
    with pytest.raises(GatewayFailed, match="ended with exit code"), gateway(["127.0.0.1:1"], options={"policy": "no"}):
        pass


def test_everything_listens_on_this_machine_only():
    found = arguments(["127.0.0.1:1", "[::1]:2"], 3, 4, {"policy": "cache_aware"})
    assert found == ["launch", "--host", "127.0.0.1", "--port", "3", "--prometheus-host", "127.0.0.1",
                     "--prometheus-port", "4", "--policy", "cache_aware",
                     "--worker-urls", "grpc://127.0.0.1:1", "grpc://[::1]:2"]  # fmt: skip


def test_a_demo_whose_server_does_not_start_says_so(capfd: pytest.CaptureFixture[str]):
    assert smg_demo.main((sys.executable, "-c", "raise SystemExit(3)")) == 1
    assert "smg-demo: the service ended with exit code 3 before it was ready" in capfd.readouterr().err


@pytest.mark.parametrize(("missing", "named", "package"), [
    (["smg"], "smg", "smg>=1.13"), (["smg_grpc_proto"], "smg_grpc_proto", "smg-grpc-proto>="),
    (["smg", "openai"], "smg, openai", "openai>="),
])
def test_the_demo_says_what_is_missing_before_it_starts_anything(repository: Path, missing: list[str], named: str,
                                                                package: str):
    """The packages are hidden from a process of its own; a server that it started would say so and fail."""
    script = ("import sys, importlib.util as util; find = util.find_spec\n"
              f"sys.modules.update(dict.fromkeys({missing}))\n"
              f"util.find_spec = lambda name: None if name in {missing} else find(name)\n"
              "from serve import smg_demo\n"
              "sys.exit(smg_demo.main((sys.executable, '-c', 'print(1 / 0)')))")
    found = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and not found.stdout
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"smg-demo: {named} missing; install with: {sys.executable} -m pip install")
    assert package in line


def test_what_the_demo_needs_is_what_developers_install(repository: Path):
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(smg_demo.NEEDED.values()) <= {one.partition(";")[0] for one in extras["dev"]}


def test_a_gateway_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GatewayFailed, match="pip install smg"), gateway(["127.0.0.1:1"]):
        pass
