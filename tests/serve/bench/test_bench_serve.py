"""`jaxinfer bench serve` from its command line against a real server, whose tokens are known beforehand."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from counting_engine import EOS, CountingEngine, make_core
from serving import Served, eventually, serving

from jaxinfer import cli
from jaxinfer.errors import Overloaded, StepFailed
from serve.bench.connection import Connections

TOKEN = "0123456789abcdef"  # noqa: S105 - of a test
QUIET = ("--disable-tqdm", "--json")
Answer = tuple[int, dict[str, Any], str]
Bench = Callable[..., Answer]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command: exit code, the JSON it prints ({} for none), its standard error."""
    def run(served: Served, *words: str) -> Answer:
        code = cli.main(["bench", "serve", "--address", served.server.address, *QUIET, *words])
        printed = capsys.readouterr()
        return code, json.loads(printed.out or "{}"), printed.err

    return run


@pytest.fixture
def counting() -> Iterator[Served]:
    """A server for one test, whose engine stands still until it is told to go on."""
    engine = CountingEngine(pace=0.001, max_waiting=3)
    engine.paused = True
    with serving(make_core(engine)) as found:
        yield found


def lines(path: Path, *entries: Any) -> str:
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return str(path)


def test_tokens_and_counts_are_those_of_the_server(served: Served, bench: Bench, tmp_path: Path):
    file, load = tmp_path / "x.json", ["--num-prompts", "12", "--random-input-len", "9", "--random-output-len", "7"]
    code, found, _ = bench(served, *load, "--request-rate", "400", "--save-result", str(file), "--save-detailed",
                           "--goodput", "ttft:60000", "e2el:60000", "--plot", str(tmp_path / "x.svg"))
    assert code == 0
    assert (found["completed"], found["failed"], found["failed_by_status"]) == (12, 0, {})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12 * 9, 12 * 7)
    assert found["total_cached_tokens"] == 12 * 4  # half of each prompt, says this engine
    assert found["request_goodput"] == found["request_throughput"] == 12 / found["duration"]
    assert found["output_throughput"] == pytest.approx(84 / found["duration"])
    assert found["duration"] >= 12 / 400
    saved = json.loads(file.read_text())
    assert found.items() <= saved.items()
    assert saved["output_lens"] == [7] * 12 and saved["errors"] == [""] * 12
    assert all(len(text) for text in saved["generated_texts"])
    assert saved["arrival_times"] == sorted(saved["arrival_times"])
    assert (tmp_path / "x.svg").read_text().startswith("<svg ")


VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests",
}  # fmt: skip
VLLM_DETAILS = {
    "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "generated_texts",
    "errors",
}  # fmt: skip


def test_the_keys_are_vllms(served: Served, bench: Bench, tmp_path: Path):
    file = tmp_path / "x.json"
    words = ["--num-prompts", "2", "--input-len", "4", "--output-len", "3", "--metric-percentiles", "50,99.9"]
    _, found, _ = bench(served, *words, "--percentile-metrics", "ttft,tpot,itl,e2el,server_ttft")
    wanted = {f"{figure}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el", "server_ttft")
              for figure in ("mean", "median", "std", "p50", "p99.9")}
    assert found.keys() >= wanted | VLLM_KEYS
    assert found["request_rate"] == "inf" and not VLLM_DETAILS & found.keys()
    assert all(found[key] >= 0 for key in wanted)
    bench(served, *words, "--save-result", str(file), "--save-detailed")
    assert json.loads(file.read_text()).keys() >= VLLM_DETAILS


def test_an_output_ends_where_the_model_says_unless_it_must_not(served: Served, bench: Bench, tmp_path: Path):
    path = lines(tmp_path / "x.jsonl", {"prompt": [EOS - 4], "output_tokens": 9}, {"prompt": "a", "output_tokens": 2})
    words = ["--dataset-path", path, "--num-prompts", "2"]
    assert bench(served, *words)[1]["total_output_tokens"] == 4 + 2
    assert bench(served, *words, "--ignore-eos")[1]["total_output_tokens"] == 9 + 2


def test_recorded_answers_say_how_long_an_output_is(served: Served, bench: Bench, tmp_path: Path):
    entries = [{"conversations": [{"value": "q"}, {"value": "x" * length}]} for length in (3, 8)]
    (tmp_path / "x.json").write_text(json.dumps(entries))
    words = ["--dataset-path", str(tmp_path / "x.json"), "--num-prompts", "4", "--ignore-eos"]
    code, found, error = bench(served, *words)
    assert (code, found["total_output_tokens"]) == (0, 2 * (3 + 8))
    assert "has 2 prompts for 4 requests" in error


def test_failures_are_counted_by_status(served: Served, bench: Bench, tmp_path: Path):
    bad = [{"prompt": [300 + number], "output_tokens": 3} for number in range(2)]  # beyond the vocabulary
    path = lines(tmp_path / "x.jsonl", *bad, *({"prompt": "ab", "output_tokens": 3} for _ in range(3)))
    code, found, error = bench(served, "--dataset-path", path, "--num-prompts", "5", "--goodput", "ttft:60000")
    assert (code, found["completed"], found["failed_by_status"]) == (0, 3, {"INVALID_ARGUMENT": 2})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6, 9)
    assert found["request_goodput"] == 3 / found["duration"]
    assert "failed: INVALID_ARGUMENT: " in error


def test_refused_requests_are_not_tried_again(counting: Served, bench: Bench):
    """Three have room; the engine goes on only when all others have been refused."""
    engine, refused, check_room = counting.engine, [], counting.engine.check_room

    def count(num_samples):
        try:
            check_room(num_samples)
        except Overloaded:
            refused.append(num_samples)
            engine.paused = len(refused) < 7
            raise

    engine.check_room = count  # type: ignore[method-assign]
    words = ("--num-prompts", "10", "--input-len", "4", "--output-len", "5", "--request-rate", "500")
    code, found, _ = bench(counting, *words)
    assert (code, found["completed"], found["failed_by_status"]) == (0, 3, {"RESOURCE_EXHAUSTED": 7})
    assert len(refused) == 7 and found["total_output_tokens"] == 15


def test_a_server_that_fails_midway(counting: Served, bench: Bench):
    engine = counting.engine

    def fail() -> None:
        eventually(lambda: len(engine.rows) == 2)
        engine.step()
        engine.fail(StepFailed("the device is gone"))

    thread = threading.Thread(target=fail)
    thread.start()
    code, found, error = bench(counting, "--num-prompts", "2", "--input-len", "4", "--output-len", "5")
    thread.join()
    assert (code, found["completed"], found["failed_by_status"]) == (1, 0, {"UNAVAILABLE": 2})
    assert found["mean_ttft_ms"] is None and found["total_output_tokens"] == 0
    assert error.count("failed: UNAVAILABLE: the device is gone") == 1


def test_a_deadline_ends_a_request(counting: Served, bench: Bench):
    words = ("--num-prompts", "2", "--input-len", "4", "--timeout", "0.2")
    code, found, _ = bench(counting, *words)
    assert (code, found["failed_by_status"]) == (1, {"DEADLINE_EXCEEDED": 2})
    eventually(lambda: not counting.engine.rows)


def test_the_load_is_spread_over_connections_of_their_own(bench: Bench):
    """A connection runs one call here; the second would wait in the library if they shared it."""
    engine = CountingEngine(pace=0.001)
    engine.paused = True
    with serving(make_core(engine), max_streams=1) as served:
        def go_on() -> None:
            eventually(lambda: len(engine.rows) == 2)
            engine.paused = False

        thread = threading.Thread(target=go_on)
        thread.start()
        words = ("--num-prompts", "2", "--input-len", "4", "--output-len", "3", "--connections", "2", "--timeout", "9")
        assert bench(served, *words)[1]["completed"] == 2
        thread.join()


def test_the_connection_with_the_fewest_calls_is_taken():
    class Channel:
        def unary_unary(self, *args, **kwargs):
            return None

        unary_stream = unary_unary

    connections = Connections([Channel(), Channel()], None)
    assert [connections.acquire() for _ in range(3)] == [0, 1, 0]
    connections.release(0)
    connections.release(0)
    assert [connections.acquire() for _ in range(2)] == [0, 0]


def test_warm_ups_do_not_count(served: Served, bench: Bench):
    before = served.engine.metrics()["finished"].get("length", 0)
    words = ("--num-prompts", "3", "--num-warmups", "2", "--input-len", "4", "--output-len", "3")
    _, found, _ = bench(served, *words)
    assert found["completed"] == 3 and found["total_output_tokens"] == 9
    assert served.engine.metrics()["finished"]["length"] - before == 5


def test_at_most_so_many_run_at_once(served: Served, bench: Bench):
    words = ("--num-prompts", "9", "--input-len", "4", "--output-len", "6", "--max-concurrency", "2")
    _, found, _ = bench(served, *words)
    assert found["max_concurrent_requests"] == 2 and found["latency_from"] == "sending"
    _, found, _ = bench(served, *words, "--request-rate", "500")
    assert found["max_concurrent_requests"] <= 2 and found["latency_from"] == "scheduled arrival"


def test_a_run_finds_nothing_of_the_last_one_in_the_cache(served: Served, bench: Bench, monkeypatch):
    salts = []
    submit = served.engine.submit
    monkeypatch.setattr(served.engine, "submit", lambda request, consumer: (
        salts.append(request.cache_salt), submit(request, consumer)))
    words = ("--num-prompts", "2", "--input-len", "4", "--output-len", "1")
    bench(served, *words)
    bench(served, *words)
    assert salts[0] == salts[1] != salts[2] == salts[3]
    bench(served, *words, "--cache-salt", "mine")
    bench(served, *words, "--cache-salt", "mine")
    assert len(set(salts[4:])) == 1


def test_tls_and_a_token(bench: Bench, tmp_path: Path):
    issued = Authority(tmp_path, "ours").issue("server")
    (tmp_path / "tokens").write_text(f"# who may\nteam {TOKEN}\n")
    with serving(make_core(CountingEngine(pace=0.001)), tls_cert=str(issued.cert), tls_key=str(issued.key),
                 token_file=str(tmp_path / "tokens"), connect={"tls": issued.trusted()}) as served:
        words = ("--num-prompts", "2", "--input-len", "4", "--output-len", "3", "--tls-ca", str(issued.ca))
        code, _, error = bench(served, *words)
        assert code == 1 and "UNAUTHENTICATED" in error and "--token-file" in error
        assert bench(served, *words, "--token-file", str(tmp_path / "tokens"))[1]["completed"] == 2
        code, _, error = bench(served, *words[:-2])
        assert code == 1 and "UNAVAILABLE" in error and "if it has TLS: --tls, or --tls-ca" in error


def test_speculation_is_read_from_the_metrics(bench: Bench, monkeypatch):
    """Each request that ends stands for one round, which kept two of four proposals."""
    engine = CountingEngine(pace=0.001)
    snapshot = engine.metrics

    def metrics() -> dict[str, Any]:
        found = snapshot()
        rounds = found["finished"].get("length", 0)
        return found | {"draft_tokens": 4 * rounds, "accepted_tokens": 2 * rounds, "rounds_by_accepted": {2: rounds}}

    monkeypatch.setattr(engine, "metrics", metrics)
    with serving(make_core(engine), metrics_port=0) as served:
        assert served.server.metrics is not None
        words = ("--num-prompts", "3", "--num-warmups", "2", "--input-len", "4", "--output-len", "3", "--metrics-url")
        _, found, _ = bench(served, *words, served.server.metrics.url)
    assert (found["spec_decode_num_drafts"], found["spec_decode_draft_tokens"]) == (3, 12)
    assert (found["spec_decode_acceptance_rate"], found["spec_decode_acceptance_length"]) == (50, 3)
    assert found["spec_decode_per_position_acceptance_rates"] == [1, 1]


def test_metrics_that_cannot_be_read(served: Served, bench: Bench):
    code, _, error = bench(served, "--metrics-url", "http://127.0.0.1:1/metrics", "--num-prompts", "1")
    assert code == 1 and error.startswith("jaxinfer: metrics_url: ") and error.count("\n") == 1


@pytest.mark.parametrize(("words", "message"), [
    (["--request-rate", "0"], "request_rate: must be over 0"),
    (["--goodput", "speed:3"], "goodput: 'speed' is not one of"),
    (["--dataset-path", "nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
    (["--dataset-path", "EMPTY"], "has no prompts"),
    (["--dataset-path", "HUGE"], "dataset_path: a prompt cannot be sent"),
    (["--address", "127.0.0.1:1"], "address: 127.0.0.1:1 cannot be measured: UNAVAILABLE"),
    (["--token-file", "EMPTY"], "must begin with a line TOKEN or TENANT TOKEN"),
    (["--tls-ca", "nowhere.pem"], "No such file or directory: 'nowhere.pem'"),
    (["--tls-ca", "EMPTY"], "EMPTY holds no PEM certificates"),
    (["--input-len", "1m"], "random_input_len: prompts and their outputs"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(served: Served, bench: Bench, words, message, tmp_path: Path):
    (tmp_path / "EMPTY").write_text("")
    lines(tmp_path / "HUGE", {"prompt": [2**40]})
    places = [str(tmp_path / word) if word in ("EMPTY", "HUGE") else word for word in words]
    before = served.engine.metrics()["finished"].copy()
    code, found, error = bench(served, *places, "--num-prompts", "1")
    assert (code, found) == (2 if {"--request-rate", "--goodput"} & set(words) else 1, {})
    assert message in error and error.startswith("jaxinfer: ") and error.count("\n") == 1
    assert served.engine.metrics()["finished"] == before


def test_a_server_that_loads_is_waited_for(bench: Bench):
    core = make_core(CountingEngine(pace=0.001))
    with serving(None) as served:
        words = ("--num-prompts", "1", "--input-len", "4", "--output-len", "3")
        code, _, error = bench(served, *words)
        assert code == 1 and "UNAVAILABLE" in error and "--ready-check-timeout-sec" in error
        timer = threading.Timer(0.3, lambda: served.call(served.server.ready(core)))
        timer.start()
        assert bench(served, *words, "--ready-check-timeout-sec", "20")[1]["completed"] == 1
        timer.join()


def test_the_table_and_the_bar(served: Served, capsys):
    words = ["bench", "serve", "--address", served.server.address, "--num-prompts", "3", "--input-len", "4"]
    assert cli.main([*words, "--output-len", "3", "--request-rate", "100"]) == 0
    printed = capsys.readouterr()
    assert "Successful requests:                     3\n" in printed.out
    assert "Request rate configured (RPS):           100.00\n" in printed.out
    assert "P99 TTFT (ms):" in printed.out and "P99 lateness of sending (ms):" in printed.out
    assert "3/3" in printed.err


def test_it_never_imports_jax_or_numpy(repository: Path):
    script = "import sys, serve.bench.command, serve.bench.plot; print({'jax', 'numpy', 'tqdm'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=repository)
    assert found.stdout == "set()\n"
