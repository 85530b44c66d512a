from __future__ import annotations

import math
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.utils import serialize_byte_tensor

from tpeft_deploy.errors import ProtocolError, TooLarge, Unsupported
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc import tensors
from tpeft_deploy.runtime.server.rpc.messages import adapter_of, request_of, response_of
from tpeft_deploy.runtime.server.rpc.tensors import decode, encode_contents, has_contents
from tpeft_deploy.runtime.server.v2.limits import RpcLimits
from tpeft_deploy.runtime.server.v2.messages import InferResponse
from tpeft_deploy.runtime.server.v2.offload import PIECE
from tpeft_deploy.runtime.server.v2.tensors import encode_raw
from tpeft_deploy.tucker import Array

LIMITS = RpcLimits()
Tensor = pb.ModelInferRequest.InferInputTensor
PLAIN = {
    "BOOL": "bool",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "uint16",
}
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
KINDS = st.sampled_from(sorted(PLAIN)).flatmap(
    lambda kind: st.tuples(st.just(kind), arrays.arrays(PLAIN[kind], SHAPES))
)
BYTES = SHAPES.flatmap(
    lambda shape: st.lists(st.binary(max_size=9), min_size=math.prod(shape), max_size=math.prod(shape)).map(
        lambda found: objects(found, shape)
    )
)


def objects(found: list[bytes], shape: tuple[int, ...]) -> Array:
    array = np.empty(len(found), object)
    for place, one in enumerate(found):
        array[place] = one
    return array.reshape(shape)


def same(got: Array, wanted: Array) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    if wanted.dtype == object:
        assert got.ravel().tolist() == wanted.ravel().tolist()
    else:
        assert got.tobytes() == wanted.tobytes()


@given(KINDS)
def test_raw_tensors_of_every_datatype_there_and_back(case: tuple[str, Array]) -> None:
    kind, array = case
    raw = encode_raw(array, kind)
    assert raw == array.astype(array.dtype.newbyteorder("<")).tobytes()
    same(decode(Tensor(name="x", datatype=kind, shape=array.shape), raw, LIMITS), array)
    same(decode(Tensor(name="x", datatype=kind, shape=array.shape), encode_raw(array.T.copy().T, kind), LIMITS), array)


@given(KINDS)
def test_typed_contents_of_every_datatype_that_has_them_there_and_back(case: tuple[str, Array]) -> None:
    kind, array = case
    if not has_contents(kind):
        assert kind in ("FP16", "BF16")
        with pytest.raises(ProtocolError, match="raw_input_contents"):
            decode(Tensor(name="x", datatype=kind, shape=array.shape), None, LIMITS)
        return
    contents = encode_contents(array, kind)
    tensor = Tensor(name="x", datatype=kind, shape=array.shape, contents=contents)
    same(decode(Tensor.FromString(tensor.SerializeToString()), None, LIMITS), array)


@given(BYTES)
def test_bytes_raw_and_typed_there_and_back_and_as_tritonclient_writes_them(array: Array) -> None:
    raw = encode_raw(array, "BYTES")
    if array.size:
        assert raw == serialize_byte_tensor(array).item()
    same(decode(Tensor(name="x", datatype="BYTES", shape=array.shape), raw, LIMITS), array)
    tensor = Tensor(name="x", datatype="BYTES", shape=array.shape, contents=encode_contents(array, "BYTES"))
    same(decode(tensor, None, LIMITS), array)


@pytest.mark.parametrize(("count", "pauses"), [(PIECE, 0), (PIECE + 1, 8)])
def test_others_run_between_the_steps_of_many_typed_elements(
    monkeypatch: pytest.MonkeyPatch, count: int, pauses: int
) -> None:
    breaths: list[None] = []
    monkeypatch.setattr(tensors, "breathe", lambda: breaths.append(None))
    array = np.arange(count, dtype=np.float32)
    contents = encode_contents(array, "FP32")
    assert len(breaths) == pauses
    tensor = Tensor(name="x", datatype="FP32", shape=[count], contents=contents)
    np.testing.assert_array_equal(decode(tensor, None, LIMITS), array, strict=True)
    assert len(breaths) == 2 * pauses


def test_bf16_are_the_upper_halves_of_float32() -> None:
    numbers = np.array([[0.5, -3, 1e30], [0.25, -2, 0]], np.float32)
    halves = numbers.astype(ml_dtypes.bfloat16)
    raw = halves.tobytes()
    got = decode(Tensor(name="x", datatype="BF16", shape=[2, 3]), raw, LIMITS)
    same(got, (halves.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    assert encode_raw(got, "BF16") == raw


@pytest.mark.parametrize(
    ("tensor", "raw", "text"),
    [
        (Tensor(datatype="FP32", shape=[2]), b"1234567", "expected 8 bytes, got 7"),
        (Tensor(datatype="FP32", shape=[2]), b"123456789", "expected 8 bytes, got 9"),
        (Tensor(datatype="FP32", shape=[-1]), b"1234", "sizes of 0 or more"),
        (Tensor(datatype="FP32", shape=[-2, -2]), b"1" * 16, "sizes of 0 or more"),
        (Tensor(datatype="BOOL", shape=[2]), b"\1\2", "0 or 1"),
        (Tensor(datatype="FLOAT", shape=[1]), b"1234", "FP32, FP64, BYTES, got 'FLOAT'"),
        (Tensor(datatype="", shape=[1]), b"1234", "datatype"),
        (Tensor(datatype="BYTES", shape=[1]), b"\5\0\0\0abcd", "1 elements of BYTES"),
        (Tensor(datatype="BYTES", shape=[1]), b"\3\0\0\0abcd", "1 elements of BYTES"),
        (Tensor(datatype="BYTES", shape=[1]), b"\xff\xff\xff\xffabcd", "1 elements of BYTES"),
        (Tensor(datatype="BYTES", shape=[2]), b"\4\0\0\0abcd", "2 elements of BYTES"),
        (Tensor(datatype="BYTES", shape=[0]), b"\0\0\0\0", "0 elements of BYTES"),
        (Tensor(datatype="FP32", shape=[2], contents={"fp32_contents": [1]}), None, "2 elements in fp32_contents"),
        (Tensor(datatype="FP32", shape=[1], contents={"fp64_contents": [1]}), None, "got fp64_contents"),
        (
            Tensor(datatype="INT8", shape=[2], contents={"int_contents": [1, 128]}),
            None,
            "within INT8, got 1 to 128",
        ),
        (Tensor(datatype="UINT8", shape=[1], contents={"uint_contents": [256]}), None, "within UINT8"),
    ],
)
def test_elements_that_do_not_fit_datatype_and_shape(tensor: Tensor, raw: bytes | None, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        decode(tensor, raw, LIMITS)


@pytest.mark.parametrize(
    "shape", [[1 << 62, 1 << 62], [1 << 40], [0, 1 << 62, 1 << 62], [1 << 32, 0, 1 << 32], [65, 65, 65], [1] * 33]
)
@pytest.mark.parametrize("kind", ["FP32", "BYTES"])
def test_shapes_beyond_the_limits_take_no_memory(shape: list[int], kind: str) -> None:
    for raw in (b"", None):
        with pytest.raises(TooLarge, match="at most"):
            decode(Tensor(name="x", datatype=kind, shape=shape), raw, RpcLimits(elements=1 << 18, strings=1 << 10))


def request(**fields: object) -> pb.ModelInferRequest:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1]}
    whole = {"model_name": "m", "inputs": [tensor], "raw_input_contents": [b"\0\0\0\0"], **fields}
    return pb.ModelInferRequest(**whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"model_name": ""}, ProtocolError, "model_name"),
        ({"raw_input_contents": [b"", b""]}, ProtocolError, "2 for 1 inputs"),
        ({"parameters": {"timeout": {"int64_param": -1}}}, ProtocolError, "'timeout': expected a whole number"),
        ({"parameters": {"timeout": {"bool_param": True}}}, ProtocolError, "'timeout'"),
        ({"parameters": {"priority": {"string_param": "high"}}}, ProtocolError, "'priority'"),
        ({"parameters": {"adapter": {"int64_param": 3}}}, ProtocolError, "'adapter'"),
        ({"parameters": {"mine": {}}}, ProtocolError, "parameter 'mine': expected a value"),
        ({"outputs": [{"name": "y"}, {"name": "y"}]}, ProtocolError, "asked for twice"),
        ({"outputs": [{"name": ""}]}, ProtocolError, "no name"),
        (
            {"outputs": [{"name": "y", "parameters": {"classification": {"int64_param": 3}}}]},
            Unsupported,
            "classification",
        ),
    ],
)
def test_requests_that_the_protocol_does_not_know(fields: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        request_of(request(**fields), LIMITS)


def test_inputs_named_twice_unnamed_in_both_forms_or_in_shared_memory() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1]}
    raw = [b"\0\0\0\0"] * 2
    for other in ({**tensor}, {**tensor, "name": ""}):
        with pytest.raises(ProtocolError, match="no name, or that of another"):
            request_of(request(inputs=[tensor, other], raw_input_contents=raw), LIMITS)
    with pytest.raises(ProtocolError, match="both"):
        request_of(request(inputs=[{**tensor, "contents": {"fp32_contents": [1]}}]), LIMITS)
    shared = {**tensor, "parameters": {"shared_memory_region": {"string_param": "r"}}}
    with pytest.raises(Unsupported, match="shared memory"):
        request_of(request(inputs=[shared], raw_input_contents=[]), LIMITS)


def test_deadlines_the_smaller_counts_and_words_of_the_request() -> None:
    timed = request(
        model_version="3",
        id="mine",
        outputs=[{"name": "b"}, {"name": "a"}],
        parameters={
            "timeout": {"int64_param": 1_500_000},
            "priority": {"uint64_param": 4},
            "adapter": {"string_param": "t"},
            "other": {"double_param": 0.5},
        },
    )
    got = request_of(timed, LIMITS, None, 2.0)
    assert (got.model, got.version, got.id, got.outputs) == ("m", "3", "mine", ("b", "a"))
    assert (got.timeout, got.priority, got.adapter) == (1.5, 4, "t")
    assert request_of(timed, LIMITS, "t", 1.0).timeout == 1.0
    assert request_of(timed, LIMITS).timeout == 1.5
    assert request_of(request(parameters={"timeout": {"int64_param": 0}}), LIMITS).timeout is None
    with pytest.raises(ProtocolError, match="'t', 'u'"):
        request_of(timed, LIMITS, "u")
    assert adapter_of({"x-adapter": "t", "multiplexed_model_id": "t"}) == "t"
    assert adapter_of({"x-request-id": "t"}) is None
    with pytest.raises(ProtocolError, match="one task"):
        adapter_of({"x-adapter": "t", "serve_multiplexed_model_id": "u"})


def test_answers_in_the_form_of_the_request() -> None:
    outputs: dict[str, Array] = {"y": np.array([[1, 2]], np.float32), "n": np.array([7], np.int64)}
    parameters = {"adapter_digest": "ab", "rows": 1, "share": 0.5, "warm": True}
    response = InferResponse("m", "2", "mine", outputs, ["FP32", "INT64"], parameters)  # type: ignore[arg-type]
    raw = response_of(response, raw=True)
    assert list(raw.raw_output_contents) == [struct.pack("<2f", 1, 2), struct.pack("<q", 7)]
    assert not raw.outputs[0].HasField("contents")
    assert (raw.parameters["share"].double_param, raw.parameters["rows"].int64_param) == (0.5, 1)
    assert raw.parameters["warm"].WhichOneof("parameter_choice") == "bool_param"
    assert "triton_final_response" not in raw.parameters
    typed = response_of(response, raw=False, final=True)
    assert list(typed.outputs[0].contents.fp32_contents) == [1, 2]
    assert list(typed.outputs[1].contents.int64_contents) == [7]
    assert not typed.raw_output_contents
    assert typed.parameters["triton_final_response"].bool_param
    half = InferResponse("m", "", "", {**outputs, "h": np.ones(2, np.float16)}, ["FP32", "INT64", "FP16"])
    assert len(response_of(half, raw=False).raw_output_contents) == 3
    with pytest.raises(TypeError, match="float64"):
        response_of(InferResponse("m", "", "", {"y": np.ones(1)}, ["FP32"]), raw=True)
