"""What gateways ask before and between requests: model, server, load, health, tokenizer."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import grpc
import pytest
from counting_engine import EOS, VOCAB_SIZE, CountingEngine, make_core, write_tokenizer
from serving import Served, eventually, serving

from jaxinfer.intake import GenerationDefaults
from jaxinfer.tokenizer import Tokenizer

pytest.importorskip("smg_grpc_proto", reason="needs smg-grpc-proto")

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2
from vllm_peer import Peer, refusal

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def test_model_info(peer: Peer):
    info = peer.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert info == pb.GetModelInfoResponse(
        model_path="counting", served_model_name="counting", is_generation=True, max_context_length=300_000,
        vocab_size=VOCAB_SIZE, model_type="counting", eos_token_ids=[EOS], max_req_input_len=299_999,
        default_sampling_params_json='{"temperature": 0.7}')


def test_the_models_wishes(served: Served, monkeypatch: pytest.MonkeyPatch, peer: Peer):
    assert served.core is not None
    config = {"temperature": 0.25, "top_p": 0.5, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.5}
    monkeypatch.setattr(served.core.intake, "defaults", GenerationDefaults.from_config(config))
    said = peer.stub.GetModelInfo(pb.GetModelInfoRequest()).default_sampling_params_json
    assert json.loads(said) == {"temperature": 0.25, "top_p": 0.5, "top_k": 20, "repetition_penalty": 1.5}
    monkeypatch.setattr(served.core.intake, "defaults", GenerationDefaults())
    assert peer.stub.GetModelInfo(pb.GetModelInfoRequest()).default_sampling_params_json == ""


def test_server_info_and_loads(stepped: Served, slow: Peer):
    call = slow.start(max_tokens=10)
    eventually(lambda: stepped.engine.rows)
    info = slow.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.active_requests, info.data_parallel_size, info.model_dtype) == (1, 1, "int32")
    assert info.uptime_seconds > 0 and info.last_receive_timestamp > 1e9
    found = slow.stub.GetLoads(pb.GetLoadsRequest())
    (load,) = found.loads
    assert found.dp_rank_count == 1 and found.timestamp.startswith("20")
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (1, 0, 1)
    assert load.token_usage == 3 / 64
    call.cancel()


def test_health():
    with serving(None) as served, grpc.insecure_channel(served.server.address) as channel:
        stub = pb_grpc.VllmEngineStub(channel)
        calls = [lambda: [stub.HealthCheck(pb.HealthCheckRequest())],
                 lambda: [stub.GetModelInfo(pb.GetModelInfoRequest())],
                 lambda: [stub.GetServerInfo(pb.GetServerInfoRequest())], lambda: [stub.GetLoads(pb.GetLoadsRequest())],
                 lambda: stub.GetTokenizer(common_pb2.GetTokenizerRequest()),
                 lambda: stub.Generate(pb.GenerateRequest(text="a"))]
        for call in calls:
            code, text = refusal(call)
            assert code is UNAVAILABLE and "still loading" in text
        served.core = make_core(CountingEngine())
        served.call(served.server.ready(served.core))
        assert stub.HealthCheck(pb.HealthCheckRequest()).healthy
        served.engine.alive = False
        assert stub.HealthCheck(pb.HealthCheckRequest()) == pb.HealthCheckResponse(message="the engine has died")
        served.server.served.refuse_new("the server is stopping")
        for call in calls:
            assert refusal(call) == (UNAVAILABLE, "the server is stopping")


def archive_of(served: Served) -> bytes:
    with grpc.insecure_channel(served.server.address) as channel:
        chunks = list(pb_grpc.VllmEngineStub(channel).GetTokenizer(common_pb2.GetTokenizerRequest()))
    data = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()]
    return data


def test_the_tokenizers_files_make_the_same_tokenizer(tmp_path: Path):
    folder, unpacked = tmp_path / "model", tmp_path / "unpacked"
    folder.mkdir()
    write_tokenizer(folder)
    noise = "".join(hashlib.sha256(bytes([n // 256, n % 256])).hexdigest() for n in range(4000))  # more than a chunk
    (folder / "config.json").write_text(json.dumps({"noise": noise}))
    (folder / "secrets.txt").write_text("not for clients")
    with serving(make_core(CountingEngine(), folder=folder)) as served:
        data = archive_of(served)
        assert len(data) > 64 * 1024
        assert archive_of(served) == data
    (folder / "config.json").touch()
    with serving(make_core(CountingEngine(), folder=folder)) as another:
        assert archive_of(another) == data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert sorted(archive.namelist()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
        archive.extractall(unpacked)
    assert Tokenizer.from_folder(unpacked).encode("héllo<eos>") == [*"héllo".encode(), EOS]


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_tokenizer_without_files(with_tokenizer: bool):
    with serving(make_core(CountingEngine(), with_tokenizer=with_tokenizer)) as served:
        with pytest.raises(grpc.RpcError) as caught:
            archive_of(served)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
