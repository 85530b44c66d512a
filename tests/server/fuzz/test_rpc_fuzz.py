from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.server.rpc_serving import infer, key_of, serving
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import METHODS, SERVICE

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
SIZES = {"FP32": 4, "INT8": 1, "BOOL": 1, "UINT64": 8, "FP16": 2, "BF16": 2, "fp32": 4, "": 0}
FIELDS = {"FP32": "fp32_contents", "INT8": "int_contents", "BOOL": "bool_contents", "UINT64": "uint64_contents"}
NAMES = st.sampled_from(["echo", "alpha", "base", "digits", "x", "scores", "", "../x", "a\0b", "ü" * 50])
NUMBERS = st.integers(-(1 << 63), (1 << 63) - 1) | st.sampled_from([0, 1, 3, 4, -1])
PARAMETERS = st.dictionaries(
    st.sampled_from(["timeout", "priority", "adapter", "sequence_id", "binary_data_size", "shared_memory_region", "é"]),
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({"int64_param": NUMBERS}),
        st.fixed_dictionaries({"string_param": NAMES}),
        st.fixed_dictionaries({"bool_param": st.booleans()}),
        st.fixed_dictionaries({"double_param": st.floats()}),
    ),
    max_size=1,
)
SHAPE = st.lists(st.integers(0, 3), max_size=3) | st.just([4, 3]) | st.lists(NUMBERS, max_size=4)


@st.composite
def tensors(draw: Callable[[Any], Any]) -> tuple[dict[str, Any], bytes]:
    """A tensor with contents, and the same raw: mostly such that they fit its shape, unless that is out of bounds."""
    datatype = draw(st.sampled_from([*sorted(SIZES), "BYTES"]))
    shape = draw(SHAPE)
    count = math.prod(shape) if all(0 <= size < 100 for size in shape) and math.prod(shape) < 100 else 1
    count += draw(st.sampled_from([0, 0, 0, 1]))
    field = FIELDS.get(datatype, "bytes_contents")
    contents = {field: [b"12"] * count if field == "bytes_contents" else [draw(st.integers(0, 1))] * count}
    raw = b"\2\0\0\0ab" * count if datatype == "BYTES" else draw(st.sampled_from([b"\0", b"\1", b"\xff"])) * count
    raw = raw if datatype == "BYTES" else raw * SIZES[datatype]
    name, parameters = draw(NAMES), draw(st.just({}) | PARAMETERS)
    whole = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters, "contents": contents}
    return whole, raw


@st.composite
def requests(draw: Callable[[Any], Any]) -> bytes:
    chosen = draw(st.lists(tensors(), max_size=3))
    inputs = [dict(one) for one, _ in chosen]
    raws: list[bytes] = []
    if draw(st.booleans()):
        raws = [raw for _, raw in chosen] + draw(st.sampled_from([[], [], [b"more"]]))
        for one in inputs:
            one.pop("contents")
    version = draw(st.sampled_from(["", "", "1", "99", "current", "x"]))
    names = draw(st.lists(NAMES, max_size=2))
    message = pb.ModelInferRequest(
        model_name=draw(NAMES),
        model_version=version,
        id=draw(NAMES),
        parameters=draw(st.just({}) | PARAMETERS),
        inputs=inputs,
        outputs=[{"name": name} for name in names],
        raw_input_contents=raws,
    )
    return bytes(message.SerializeToString())


@st.composite
def damaged(draw: Callable[[Any], Any]) -> bytes:
    data = draw(requests())
    at = draw(st.integers(0, len(data)))
    put = draw(st.binary(max_size=6))
    return bytes(data[:at] + put + data[at + draw(st.integers(0, 8)) :])


@pytest.mark.timeout(120)
def test_no_message_is_an_internal_error_and_the_server_lives() -> None:
    with serving() as server, grpc.insecure_channel(server.address) as channel:
        unary = {rpc: channel.unary_unary(f"/{SERVICE}/{rpc}") for rpc in METHODS if not METHODS[rpc].stream}
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        seen: set[str] = set()

        def status(rpc: str, data: bytes) -> str:
            found = "OK"
            try:
                unary[rpc](data, metadata=key_of("acme-deploy"), timeout=100)
            except grpc.RpcError as error:
                found = str(error.code().name)
            seen.add(found)
            return found

        @FUZZ
        @given(requests())
        def messages(data: bytes) -> None:
            assert status("ModelInfer", data) not in ("INTERNAL", "UNKNOWN")

        @FUZZ
        @given(st.sampled_from(sorted(unary)), st.binary(max_size=200) | damaged())
        def raw_bytes(rpc: str, data: bytes) -> None:
            assert status(rpc, data) not in ("INTERNAL", "UNKNOWN")

        @settings(FUZZ, max_examples=60)
        @given(st.lists(st.binary(max_size=200) | requests() | damaged(), max_size=5))
        def streams(sent: list[bytes]) -> None:
            got = list(stream(iter(sent), metadata=key_of("acme-deploy"), timeout=100))
            assert len(got) == len(sent)
            for one in got:
                assert "internal error" not in pb.ModelStreamInferResponse.FromString(one).error_message

        messages()
        raw_bytes()
        streams()
        assert seen >= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
        assert status("ServerLive", b"") == status("ModelInfer", infer().SerializeToString()) == "OK"
        assert server.core.running == 0
        assert not [one for one in server.exchanges if one.status == 500]
