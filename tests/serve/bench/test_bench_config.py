"""What a run may be asked to do; each mistake is named."""

import dataclasses
import math

import pytest

from jaxinfer.bench_serve_options import BENCH_SERVE_OPTIONS
from jaxinfer.errors import InvalidConfig
from serve.bench.config import BenchConfig

MISTAKES = [
    ({"request_rate": 0}, "request_rate: must be over 0"),
    ({"request_rate": -1}, "request_rate: must be over 0"),
    ({"request_rate": math.nan}, "request_rate: must be over 0"),
    ({"burstiness": 0}, "burstiness: must be over 0"),
    ({"num_prompts": 0}, "num_prompts: must be at least 1"),
    ({"max_concurrency": 0}, "max_concurrency: must be at least 1"),
    ({"connections": 0}, "connections: must be at least 1"),
    ({"timeout": 0}, "timeout: must be over 0"),
    ({"ready_check_timeout_sec": math.inf}, "ready_check_timeout_sec: must be at least 0 seconds and finite"),
    ({"goodput": ["latency:3"]}, "goodput: 'latency' is not one of ttft, tpot, e2el"),
    ({"goodput": ["ttft"]}, "goodput: 'ttft' needs milliseconds"),
    ({"goodput": ["ttft:fast"]}, "goodput: 'ttft:fast' needs milliseconds"),
    ({"goodput": ["ttft:-1"]}, "goodput: 'ttft:-1' needs milliseconds"),
    ({"goodput": ["ttft:nan"]}, "goodput: 'ttft:nan' needs milliseconds"),
    ({"percentile_metrics": "ttft,speed"}, "percentile_metrics: 'speed' is not one of ttft, tpot, itl, e2el"),
    ({"metric_percentiles": "50,101"}, "metric_percentiles: must be in [0, 100], got 101"),
    ({"metric_percentiles": "p99"}, "metric_percentiles: 'p99' is not a number"),
    ({"dataset_name": "sonnet"}, "dataset_name: 'sonnet' is not one of random, custom, sharegpt"),
    ({"dataset_name": "custom"}, "dataset_path: is missing"),
    ({"dataset_name": "random", "dataset_path": "x"}, "dataset_path: is not read with the dataset random"),
    ({"random_range_ratio": 1.0}, "random_range_ratio: must be in [0, 1)"),
    ({"random_input_len": 0}, "random_input_len: the shortest prompt would have 0 tokens"),
    ({"random_input_len": 1, "random_range_ratio": 0.5}, "random_input_len: the shortest prompt"),
    ({"random_output_len": 0}, "random_output_len: must be at least 1"),
    ({"output_len": 0}, "output_len: must be at least 1"),
    ({"port": 0}, "port: must be in [1, 65535]"),
    ({"tls_cert": "c"}, "tls_key: is missing"),
    ({"tls_key": "k"}, "tls_cert: is missing"),
    ({"metrics_url": "file:///etc/passwd"}, "metrics_url: must begin with http:// or https://"),
    ({"save_detailed": True}, "save_detailed: says what --save-result writes"),
    ({"save_result": "nowhere/x.json"}, "save_result: nowhere/x.json: there is no folder nowhere"),
    ({"save_result": "/"}, "save_result: / is a folder; name a file in it"),
    ({"plot": "x.png"}, "plot: is written as SVG"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=str)
def test_mistakes_are_named(fields, message):
    with pytest.raises(InvalidConfig) as error:
        BenchConfig(**fields)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["save_result", "plot"])
def test_results_that_could_not_be_written_are_refused_before_the_run(name, tmp_path, monkeypatch):
    old, new = tmp_path / "old.svg", tmp_path / "new.svg"
    old.write_text("kept")
    assert BenchConfig(**{name: str(old)}) and BenchConfig(**{name: str(new)})
    assert old.read_text() == "kept" and not new.exists()
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(InvalidConfig, match=f"^{name}: .*folder.svg is a folder"):
        BenchConfig(**{name: str(tmp_path / "folder.svg")})
    for locked, wanted in ((old, old), (tmp_path, new)):
        monkeypatch.setattr("os.access", lambda path, mode, locked=locked: path != locked)
        with pytest.raises(InvalidConfig, match=f"^{name}: .* cannot be written by this user"):
            BenchConfig(**{name: str(wanted)})


def test_options_are_the_fields():
    fields = {field.name: field.default for field in dataclasses.fields(BenchConfig)}
    assert {option.name: option.default for option in BENCH_SERVE_OPTIONS} == fields


def test_goodput_is_read_in_one_word_or_several():
    wanted = {"ttft": 200.0, "tpot": 50.0, "e2el": 0.0}
    assert BenchConfig(goodput=["ttft:200", "tpot:50", "e2el:0"]).limits == wanted
    assert BenchConfig(goodput=["ttft:200 tpot:50", "e2el:0"]).limits == wanted
    assert BenchConfig().limits == {}


def test_what_follows_from_the_fields():
    assert BenchConfig(port=7).target == "127.0.0.1:7"
    assert BenchConfig(host="::1").target == "[::1]:50051"
    assert BenchConfig(address="unix:/x", port=7).target == "unix:/x"
    assert BenchConfig(dataset_path="x.json").dataset == "sharegpt"
    assert BenchConfig(dataset_path="x.jsonl").dataset == "custom"
    assert [BenchConfig(num_prompts=n).num_connections for n in (1, 200, 201, 1000)] == [1, 1, 2, 5]
    assert BenchConfig(max_concurrency=64).num_connections == 1
    assert BenchConfig(max_concurrency=64).is_closed_loop
    assert not BenchConfig(max_concurrency=64, request_rate=1.0).is_closed_loop and not BenchConfig().is_closed_loop
    assert BenchConfig(metric_percentiles="50, 99.9").percentiles == (50.0, 99.9)
    assert BenchConfig(tls_ca="x").uses_tls and not BenchConfig().uses_tls
