"""One line of JSON a request, over real channels."""

import json
import logging
from collections.abc import Iterator

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from serving import Served, eventually, serving

from serve.client import Client

FIELDS = {"time", "id", "tenant", "code", "field", "finish", "prompt_tokens", "cached_tokens", "output_tokens", "queue",
          "ttft", "total", "preemptions"}
PROMPT = "tell nobody of Zanzibar"


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def wait(self, number: int) -> list[dict]:
        eventually(lambda: len(self.texts) >= number)
        assert len(self.texts) == number
        return [json.loads(text) for text in self.texts]


@pytest.fixture
def lines() -> Iterator[Lines]:
    log, found = logging.getLogger("jaxinfer.requests"), Lines()
    level = log.level
    log.addHandler(found)
    yield found
    log.removeHandler(found)
    log.setLevel(level)


@pytest.fixture
def logged(lines: Lines) -> Iterator[Served]:
    with serving(make_core(CountingEngine(pace=0.001, max_waiting=4)), request_log=True) as found:
        yield found


def test_an_answered_request_has_its_counts_and_times(logged: Served, lines: Lines):
    logged.client.generate([1] * 8, max_tokens=3, temperature=0, request_id="mine", n=2)
    list(logged.client.stream([1] * 8, max_tokens=4, temperature=0, request_id="streamed"))
    one, streamed = lines.wait(2)
    assert (one["id"], one["tenant"], one["code"], one["finish"]) == ("mine", "", "OK", {"length": 2})
    assert (one["prompt_tokens"], one["cached_tokens"], one["output_tokens"], one["preemptions"]) == (8, 4, 6, 0)
    assert (streamed["id"], streamed["output_tokens"]) == ("streamed", 4)
    assert set(one) == set(streamed) == FIELDS  # and so no text and no token ids
    for line in (one, streamed):
        assert 0 <= line["queue"] <= line["ttft"] <= line["total"] < 10


def test_refused_and_cancelled_requests_have_their_status(logged: Served, lines: Lines):
    with pytest.raises(grpc.RpcError):
        logged.client.generate(PROMPT, max_tokens=-1, request_id="bad")
    logged.engine.paused = True
    stream = logged.client.stream([1, 2], max_tokens=9, request_id="left")
    eventually(lambda: logged.engine.rows)
    stream.cancel()
    lines.wait(2)
    with pytest.raises(grpc.RpcError):
        logged.client.generate([1, 2], timeout=0.05, request_id="late")
    bad, left, late = lines.wait(3)
    assert {key: bad[key] for key in bad if key not in ("time", "total")} == {
        "id": "bad", "tenant": "", "code": "INVALID_ARGUMENT", "field": "max_tokens"}
    assert 0 <= bad["total"] < 10
    assert (left["id"], left["code"], left["finish"], left["ttft"]) == ("left", "CANCELLED", {}, None)
    assert (late["id"], late["code"], late["prompt_tokens"]) == ("late", "DEADLINE_EXCEEDED", 2)


def test_no_text_is_logged_and_ids_stay_on_their_line(logged: Served, lines: Lines):
    hostile = "a\n\u2028\x1b" * 42
    list(logged.client.stream(PROMPT, max_tokens=3, stop=["Zanzibar"], cache_salt="Zanzibar", request_id=hostile))
    logged.client.tokenize(PROMPT)
    (one,) = lines.wait(1)
    assert "Zanzibar" not in lines.texts[0]
    assert lines.texts[0].isascii() and lines.texts[0].isprintable()
    assert len(one["id"]) == 128


def test_the_tenant_is_named(lines: Lines, tmp_path):
    token = "0123456789abcdef"  # noqa: S105 (of this test alone)
    (tmp_path / "tokens").write_text(f"acme {token}\n")
    core = make_core(CountingEngine(pace=0.001))
    with serving(core, request_log=True, token_file=str(tmp_path / "tokens")) as served, Client(
            served.server.address, token=token) as client:
        client.generate([1, 2], max_tokens=1)
        assert lines.wait(1)[0]["tenant"] == "acme"


def test_nothing_is_logged_unless_asked(stepped: Served, lines: Lines):
    stream = stepped.client.stream([1, 2], max_tokens=1)
    eventually(lambda: stepped.engine.rows)
    stepped.engine.step()
    list(stream)
    eventually(lambda: not stepped.server.served.calls.num_running)
    assert not lines.texts


def test_a_request_that_a_gateway_aborts_says_so(lines: Lines):
    pytest.importorskip("smg_grpc_proto")
    from vllm_peer import connected

    with serving(make_core(CountingEngine()), request_log=True) as served, connected(served.server.address) as peer:
        stream = peer.start("ab", request_id="g")
        eventually(lambda: served.engine.rows)
        peer.abort("g")
        list(stream)
        (one,) = lines.wait(1)
    assert (one["id"], one["code"], one["finish"], one["prompt_tokens"]) == ("g", "OK", {"abort": 1}, 2)
