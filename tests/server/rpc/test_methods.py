from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import METHODS, SERVICE

ROOT = Path(__file__).parents[3]
LISTED = """
import json, importlib, sys
from google.protobuf import descriptor_pb2
found = {}
def walk(prefix, message):
    found[prefix + message.name] = {
        "fields": {f.name: [f.number, f.type, f.label, f.type_name, f.HasField("oneof_index")] for f in message.field},
        "values": {},
    }
    enums(prefix + message.name + ".", message.enum_type)
    for inner in message.nested_type:
        walk(prefix + message.name + ".", inner)
def enums(prefix, types):
    for one in types:
        found[prefix + one.name] = {"fields": {}, "values": {v.name: v.number for v in one.value}}
calls = {}
for name in sys.argv[1:]:
    file = descriptor_pb2.FileDescriptorProto()
    importlib.import_module(name).DESCRIPTOR.CopyToProto(file)
    enums("", file.enum_type)
    for message in file.message_type:
        walk("", message)
    for service in file.service:
        for m in service.method:
            calls[file.package + "." + service.name + "/" + m.name] = [
                m.input_type, m.output_type, m.client_streaming, m.server_streaming
            ]
print(json.dumps([found, calls]))
"""
OURS = "tpeft_deploy.runtime.server.rpc.inference_pb2"
TRITON = ("tritonclient.grpc.model_config_pb2", "tritonclient.grpc.service_pb2")
KSERVE = ("kserve.protocol.grpc.grpc_predict_v2_pb2",)
# Triton's, which kserve has in another form that none of its clients sends.
NOT_KSERVES = ("RepositoryModelLoad", "RepositoryModelUnload")


def listed(*modules: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Messages, enums and calls; in a process of their own, as these packages' messages exclude each other."""
    done = subprocess.run(
        [sys.executable, "-c", LISTED, *modules], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    messages, calls = json.loads(done.stdout)
    return messages, calls


def test_every_message_enum_and_call_is_tritons_on_the_wire() -> None:
    messages, calls = listed(OURS)
    theirs, their_calls = listed(*TRITON)
    assert len(messages) > 50
    for name, message in messages.items():
        assert message["fields"].items() <= theirs[name]["fields"].items(), name
        assert message["values"] == theirs[name]["values"], name
    assert calls.items() <= their_calls.items()


def test_the_messages_of_inference_are_kserves_on_the_wire() -> None:
    messages, calls = listed(OURS)
    theirs, their_calls = listed(*KSERVE)
    shared = [name for name in messages if name in theirs and not name.startswith(NOT_KSERVES)]
    assert len(shared) > 20
    for name in shared:
        assert theirs[name]["fields"].items() <= messages[name]["fields"].items(), name
    of_inference = {name: call for name, call in their_calls.items() if not name.split("/")[1].startswith(NOT_KSERVES)}
    assert of_inference.items() <= calls.items()
    assert len(of_inference) == 6


def test_the_table_of_calls_is_the_services() -> None:
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    (service,) = file.service
    assert f"{file.package}.{service.name}" == SERVICE
    assert {call.name for call in service.method} == set(METHODS)
    for call in service.method:
        assert call.input_type == f".{METHODS[call.name].request.DESCRIPTOR.full_name}"
        assert call.client_streaming == call.server_streaming == METHODS[call.name].stream


def test_compiling_the_text_again_gives_the_same_modules(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools, which compiles the messages, is not installed")
    found = importlib.util.spec_from_file_location("compile_proto", ROOT / ".ci" / "compile_proto.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.compile_proto(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["inference_pb2.py", "inference_pb2.pyi"]
    for name in names:
        assert (tmp_path / name).read_text() == (ROOT / "runtime" / "server" / "rpc" / name).read_text(), name


def test_messages_live_beside_a_clients_of_the_same_names() -> None:
    from tritonclient.grpc import service_pb2

    theirs = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"ab"])
    ours = pb.ModelInferRequest.FromString(theirs.SerializeToString())
    assert (ours.model_name, list(ours.raw_input_contents)) == ("m", [b"ab"])
    assert type(ours) is not type(theirs)
