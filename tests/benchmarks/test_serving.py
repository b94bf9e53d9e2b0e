"""What bench_serve makes of what it saw: gaps, recovery, declared times."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("smg_grpc_proto", reason="needs smg-grpc-proto")

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb

from benchmarks.serving import paced
from benchmarks.serving.cpu import latencies
from benchmarks.serving.gaps import gaps
from benchmarks.serving.open_loop import Answer, poisson
from benchmarks.serving.recovery import Run
from benchmarks.serving.wire import NATIVE, VLLM
from jaxinfer.types import SamplerForm, StepKind, StepPlan
from serve.protos.jaxinfer.v1 import generation_pb2 as pb

PLAN = StepPlan(0, StepKind.DECODE, 8, SamplerForm.GREEDY, (0,), ((),), (0,), (True,))


def native(*ids: int) -> bytes:
    return pb.GenerateStreamResponse(deltas=[pb.Completion(token_ids=ids)]).SerializeToString()


def chunk(*ids: int) -> bytes:
    return vllm_pb.GenerateResponse(chunk=vllm_pb.GenerateStreamChunk(token_ids=ids)).SerializeToString()


def test_gaps_are_between_messages_with_tokens():
    end = vllm_pb.GenerateResponse(complete=vllm_pb.GenerateComplete(finish_reason="length")).SerializeToString()
    vllm = Answer(0.0, [(1.0, chunk(1)), (3.0, chunk(2, 3)), (9.0, end)])
    assert gaps(VLLM, [vllm, replace(vllm, arrived=[(7.0, chunk(1)), (7.5, chunk(1))])]) == [2.0, 0.5]
    assert gaps(NATIVE, [Answer(0.0, [(1.0, native(1)), (5.0, native(2))])]) == [4.0]


def test_a_late_message_is_measured_from_its_last_token():
    received = {"a": [(1.5, native(1)), (4.0, native(2, 3))]}
    assert list(latencies(NATIVE, {"a": [1.0, 2.0, 3.0]}, received)) == [0.5, 1.0]


def user(sent: float, waited: float, code: str = "OK") -> Answer:
    arrived = [(sent + waited, b"")] if code == "OK" else []
    return Answer(sent, arrived, sent + waited, code)


def test_recovery_ends_with_the_last_user_who_was_late_or_refused():
    flood = [user(10.0, 0.1), user(20.0, 0.0, "RESOURCE_EXHAUSTED")]
    users = [user(5.0, 0.2), user(9.9, 0.2), user(21.0, 1.5), user(22.2, 0.2)]
    run = Run(users, flood, [(19.5, 40), (20.0, 43), (20.5, 9), (21.4, 0), (22.0, 0)])
    assert run.before() == pytest.approx([0.2])
    assert run.recovery(limit=0.4) == pytest.approx(2.5)
    assert run.queue_seconds() == pytest.approx(1.4) and run.most_waiting() == 43
    run.users.append(user(23.0, 0.1, "UNAVAILABLE"))
    assert run.recovery(limit=0.4) == pytest.approx(3.1)
    assert Run([user(5.0, 0.2)], flood, []).recovery(limit=0.4) == 0.0


def test_no_step_is_longer_than_the_longest_declared():
    prompts = replace(PLAN, kind=StepKind.PREFILL, num_rounds=1, tokens=((1,) * paced.CONFIG.max_num_batched_tokens,))
    seconds = [paced.step_seconds(plan) for plan in (PLAN, prompts)]
    assert seconds == pytest.approx([0.08, 0.0612]) and max(seconds) == paced.longest_step()


def test_the_device_computes_one_step_after_the_other():
    device = paced.PacedDevice()
    start = SimpleNamespace(slot=0, tokens_left=10)
    first = device.dispatch(replace(PLAN, init_rows=(start,)))
    second = device.dispatch(PLAN)
    assert second.result[0] - first.result[0] == pytest.approx(0.08)
    assert [len(step.result[1][0]) for step in (first, second)] == [8, 2]  # it stops at the length
    assert device.take_steps() == [(0.08, 1), (0.08, 1)] and not device.take_steps()


def test_arrivals_have_the_rate():
    moments = list(poisson(50.0, 100.0, random.Random(0)))
    assert len(moments) == pytest.approx(5000, rel=0.05)
    assert moments == sorted(moments) and moments[-1] < 100.0
