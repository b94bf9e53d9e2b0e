"""The committed stubs are those of the committed .proto, and follow its rules."""

import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from jaxinfer.protos.v1 import draft_pb2, draft_pb2_grpc
from serve.protos import generate
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc

SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
STUBS = [name.replace(".proto", suffix) for name in generate.PROTOS for suffix in SUFFIXES]
FILES = [descriptor_pb2.FileDescriptorProto.FromString(one.DESCRIPTOR.serialized_pb) for one in (pb, draft_pb2)]
SERVICERS = {"GenerationService": pb_grpc.GenerationServiceServicer,
             "DraftService": draft_pb2_grpc.DraftServiceServicer}


def test_the_stubs_describe_the_proto(tmp_path: Path):
    """With any version of the generator: what the stubs say of messages and services is what the .proto says."""
    if generate.installed() is None:
        pytest.skip("grpcio-tools is not installed")
    generate.protoc(sys.executable, f"--descriptor_set_out={tmp_path / 'set'}")
    described = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    for found in described:
        found.ClearField("source_code_info")
        for field in (field for message in found.message_type for field in message.field):
            field.ClearField("json_name")
        (service,) = found.service
        stub = SERVICERS[service.name]
        assert {method.name for method in service.method} == {name for name in vars(stub) if not name.startswith("_")}
    assert list(described) == FILES


def test_generating_again_changes_nothing(tmp_path: Path):
    if generate.installed() != generate.GENERATOR:
        pytest.skip(f"needs grpcio-tools {generate.GENERATOR}, which cannot be installed beside protobuf 7; "
                    f"found {generate.installed()}")
    generate.generate(sys.executable, tmp_path)
    for name in STUBS:
        assert (tmp_path / name).read_text() == (generate.ROOT / name).read_text()


def test_the_stubs_name_their_generator():
    assert f"GRPC_GENERATED_VERSION = '{generate.GENERATOR}'" in (generate.ROOT / STUBS[2]).read_text()


def test_the_package_is_jaxinfer_v1():
    assert {file.package for file in FILES} == {"jaxinfer.v1"}
    assert pb.DESCRIPTOR.services_by_name["GenerationService"].full_name == "jaxinfer.v1.GenerationService"


def test_every_scalar_has_presence():
    """So that 0 and unset differ."""
    scalars = [field for file in FILES for message in file.message_type for field in message.field
               if field.label != field.LABEL_REPEATED and field.type != field.TYPE_MESSAGE]
    assert len(scalars) > 50
    assert [field.name for field in scalars if not field.HasField("oneof_index")] == []


def test_sampling_params_have_the_names_of_the_core():
    from dataclasses import fields

    from jaxinfer.types import SamplingParams
    from serve.client import Sampling

    names = {field.name for field in fields(SamplingParams)}
    assert set(pb.SamplingParams.DESCRIPTOR.fields_by_name) == names == set(Sampling.__annotations__)
