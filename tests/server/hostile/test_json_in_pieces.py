"""Large JSON is read in pieces as it would be at once, and nothing large is made of what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tpeft_deploy.errors import ProtocolError, ServerError, TooLarge
from tpeft_deploy.runtime.server.rest import infer_json, json_data
from tpeft_deploy.runtime.server.rest.infer_codec import InferenceHeaderCache
from tpeft_deploy.runtime.server.rest.infer_json import Head
from tpeft_deploy.runtime.server.rest.json_data import SMALL, cut_strings
from tpeft_deploy.runtime.server.v2.limits import RestLimits

LIMITS = RestLimits()


@pytest.fixture(scope="module")
def tiny_pieces() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_data, "PIECE", 64)
        patch.setattr(json_data, "breathe", lambda: None)
        yield


def read(text: bytes, *, pieces: bool) -> Head | str:
    own = InferenceHeaderCache(LIMITS)
    try:
        return own.read_in_pieces("m", text) if pieces else own.read("m", text)
    except ServerError as error:
        return type(error).__name__


def same(first: Head | str, second: Head | str) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    pairs = list(zip(first.inputs, second.inputs, strict=True))
    plain = [(own.name, own.datatype, own.shape, own.size) for own in first.inputs]
    return plain == [(own.name, own.datatype, own.shape, own.size) for own in second.inputs] and all(
        (a.elements is None and b.elements is None)
        or (a.elements is not None and b.elements is not None and a.elements.tolist() == b.elements.tolist())
        for a, b in pairs
    )


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    inputs: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(1, 4), max_size=3))
        kind = draw(st.sampled_from(["FP32", "FP64", "INT64", "UINT8", "BOOL", "BYTES"]))
        element: st.SearchStrategy[Any] = {
            "FP32": st.floats(-1e30, 1e30) | st.integers(-9, 9),
            "FP64": st.floats(allow_nan=False, allow_infinity=False),
            "INT64": st.integers(-(2**63), 2**63 - 1),
            "UINT8": st.integers(0, 256),
            "BOOL": st.booleans(),
            "BYTES": st.text('a"\\]}{,[', max_size=4),
        }[kind]
        count = int(np.prod(shape))
        flat = draw(st.lists(element, min_size=count, max_size=count))
        data: Any = flat
        if draw(st.booleans()) and shape:
            data = np.array(flat, object).reshape(shape).tolist()
        tensor = {"name": f"input {number}", "datatype": kind, "shape": shape, "data": data}
        inputs.append(dict(draw(st.permutations(list(tensor.items())))))
    indent = draw(st.sampled_from([None, 1]))
    return json.dumps({"id": "x", "inputs": inputs}, indent=indent).encode()


@settings(max_examples=60, deadline=None)
@given(text=requests())
def test_pieces_are_read_as_the_whole(tiny_pieces: None, text: bytes) -> None:
    assert same(read(text, pieces=True), read(text, pieces=False))


@settings(max_examples=150, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(text=requests(), data=st.data())
def test_what_is_malformed_at_once_is_malformed_in_pieces(tiny_pieces: None, text: bytes, data: st.DataObject) -> None:
    changed = bytearray(text)
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(changed) - 1))
        what = data.draw(
            st.sampled_from([b"", b",", b"[", b"]", b" ", b"1", b"-", b"e", b".", b'"', b"}", b"\\", b"[]"])
        )
        changed[at : at + data.draw(st.integers(0, 1))] = what
    assert same(read(bytes(changed), pieces=True), read(bytes(changed), pieces=False)), bytes(changed)


@pytest.mark.parametrize("mark", [b"]", b"[", b"[]", b"]["])
def test_brackets_in_a_flat_list_are_malformed(tiny_pieces: None, mark: bytes) -> None:
    numbers = [-2.5e-07, 8.914515e26, -3.0, -1.040460301365186e16, 2.25]
    tensor = {"name": "x", "datatype": "FP32", "shape": [5], "data": numbers}
    text = json.dumps({"inputs": [tensor]}).encode()
    first = text.index(b"[-2") + 1
    for at in range(first, text.rindex(b"]}]")):
        changed = text[:at] + mark + text[at:]
        assert read(changed, pieces=True) == "ProtocolError", changed


def test_no_piece_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    own = infer_json._elements

    def counted(doing: str, datatype: str, flat: Any) -> Any:
        sizes.append(len(flat))
        return own(doing, datatype, flat)

    monkeypatch.setattr(infer_json, "_elements", counted)
    count = 1 << 19
    data = np.arange(count).reshape(-1, 2).tolist()
    inputs = [{"name": "x", "datatype": "INT64", "shape": [count // 2, 2], "data": data}]
    text = json.dumps({"inputs": inputs}, separators=(",", ":")).encode()
    found = InferenceHeaderCache(LIMITS).read_in_pieces("m", bytearray(text))
    assert found.inputs[0].elements is not None
    assert np.array_equal(found.inputs[0].elements, np.arange(count))
    assert sum(sizes) == count
    assert max(sizes) <= 1 << 16


@pytest.mark.parametrize(
    "text",
    [
        b'{"inputs":[],"parameters":{' + b",".join(b'"%d":1' % n for n in range(60_000)) + b"}}",
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[' + b"1," * 200_000 + b'1],"data":[1]}]}',
        b'{"inputs":[' + b",".join([b'{"name":"x"}'] * 30_000) + b"]}",
        b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[9],"data":[' + b'"a",' * 90_000 + b'"a"]}]}',
        b'{"inputs":' + b"[" * 300_000,
        b'{"id":"' + b"\\\\" * 200_000 + b'"}',
        b'{"id":"' + b'\\"' * 200_000,
        b'"' * 300_000,
    ],
)
def test_what_is_no_number_of_a_tensor_is_small(text: bytes) -> None:
    with pytest.raises(TooLarge, match=r"262,144 bytes of JSON beside"):
        InferenceHeaderCache(LIMITS).read_in_pieces("m", text)


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([1 << 25], b"1," * 100_000 + b"1"),
        ([100_001] + [1] * 31, b"[" + b"1," * 100_000 + b"1]"),
        ([100_001], b"1," * 100_001),
        ([100_001], b"1" * 200_000),
        ([100_001], b"1," * 100_000 + b" " * 200_000 + b"1"),
        ([0, 5], b"1," * 100_000),
    ],
)
def test_lists_that_do_not_fit_make_nothing_large(shape: list[int], data: bytes) -> None:
    text = b'{"inputs":[{"name":"x","datatype":"INT64","shape":%b,"data":[%b]}]}' % (json.dumps(shape).encode(), data)
    with pytest.raises(ProtocolError):
        InferenceHeaderCache(LIMITS).read_in_pieces("m", text)


def test_data_elsewhere_is_refused() -> None:
    numbers = b"[" + b"1," * 100_000 + b"1]"
    with pytest.raises(ProtocolError):
        InferenceHeaderCache(LIMITS).read_in_pieces("m", b'{"inputs":[],"parameters":{"data":%b}}' % numbers)


def test_large_strings_are_cut_out() -> None:
    large = "A" * 100_000
    text = json.dumps({"parameters": {"file:x": large, "pin": True, "y": "z" * 9, "file:b": large + "B"}}).encode()
    head, found = cut_strings("read", text)
    parsed = json.loads(head)["parameters"]
    assert (parsed["pin"], parsed["y"]) == (True, "z" * 9)
    places = [found[parsed[name]] for name in ("file:x", "file:b")]
    assert [text[start:stop].decode() for start, stop in places] == [large, large + "B"]
    with pytest.raises(TooLarge):
        cut_strings("read", b'{"a":[' + b'"b",' * SMALL + b'"b"]}')
