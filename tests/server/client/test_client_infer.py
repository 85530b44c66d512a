"""Inference through both clients, against a peer that reads and writes the protocol by other means."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.helpers.server.client_calls import BOTH, Calling
from tests.helpers.server.client_peer import KEY, Peer, serving
from tpeft_deploy import AsyncClient
from tpeft_deploy.errors import InputError, NotFound, Unauthenticated

X = np.array([[1.5], [2.5], [-3.0]], np.float32)


@pytest.fixture(scope="module")
def served() -> Iterator[Peer]:
    peer = Peer()
    with serving(peer):
        yield peer


@pytest.fixture
def peer(served: Peer) -> Peer:
    for kept in (served.heads, served.values, served.paths, served.uploads):
        kept.clear()
    served.binary = True
    return served


@pytest.fixture(params=BOTH)
def call(request: pytest.FixtureRequest) -> Calling:
    return BOTH[request.param]


def extremes(bits: int, signed: bool) -> tuple[Any, str, list[Any]]:
    values = [-(2 ** (bits - 1)), 1, 2 ** (bits - 1) - 1] if signed else [0, 1, 2**bits - 1]
    name = f"{'' if signed else 'u'}int{bits}"
    return np.array(values, name), name.upper(), values


ARRAYS: list[tuple[Any, str, list[Any]]] = [
    (np.array([[True, False], [False, True]]), "BOOL", [True, False, False, True]),
    *(extremes(bits, signed) for bits in (8, 16, 32, 64) for signed in (True, False)),
    (np.array([1.5, -0.25], np.float16), "FP16", [1.5, -0.25]),
    (np.array([[1.5], [np.inf]], np.float32), "FP32", [1.5, np.inf]),
    (np.array(7.25), "FP64", [7.25]),
    (np.arange(6, dtype=np.int32).reshape(2, 3).T, "INT32", [0, 3, 1, 4, 2, 5]),
    (np.arange(6, dtype=np.float32)[::-2], "FP32", [5.0, 3.0, 1.0]),
    (np.array([1, 2], ">i8"), "INT64", [1, 2]),
    (np.zeros((0, 3), np.float32), "FP32", []),
    (np.array([b"a\0", b""], object), "BYTES", [b"a\0", b""]),
    (np.array([["ä", "bc"]]), "BYTES", ["ä".encode(), b"bc"]),
    (np.array([b"xyz", b"q"]), "BYTES", [b"xyz", b"q"]),
    (["one", b"two"], "BYTES", [b"one", b"two"]),
    ([[1, 2], [3, 4]], "INT64", [1, 2, 3, 4]),
]


@pytest.mark.parametrize(("array", "datatype", "flat"), ARRAYS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_kind_of_array_arrives_and_returns(
    call: Calling, peer: Peer, array: Any, datatype: str, flat: list[Any]
) -> None:
    (answer,) = call(peer.url, [lambda client: client.infer({"v": array, "b": np.array([True])}, "t")], key=KEY)
    sent = peer.heads[-1]["inputs"][0]
    assert (sent["datatype"], sent["shape"]) == (datatype, list(np.shape(array)))
    assert peer.values[-1]["v"] == flat
    found = answer["v"]
    if datatype == "BYTES":
        assert found.dtype == object
        assert found.shape == np.shape(array)
        assert found.ravel().tolist() == flat
    else:
        wanted = np.asarray(array)
        assert found.dtype == wanted.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, wanted, strict=False)
        assert found.flags.aligned
        assert found.flags.writeable


def test_a_large_tensor_is_sent_in_pieces_and_comes_back_whole(call: Calling, peer: Peer) -> None:
    pixels = np.random.default_rng(0).standard_normal((4, 3, 200, 100)).astype(np.float32)
    (answer,) = call(peer.url, [lambda client: client.infer({"image": pixels}, "t")], key=KEY)
    np.testing.assert_array_equal(answer["image"], pixels, strict=True)


@pytest.mark.parametrize("shift", range(8))
def test_tensors_behind_odd_sizes_are_aligned_all_the_same(call: Calling, peer: Peer, shift: int) -> None:
    inputs = {"b": np.ones(shift, bool), "v" * (shift + 1): np.arange(5.0)}
    (answer,) = call(peer.url, [lambda client: client.infer(inputs, "t")], key=KEY)
    for name, array in inputs.items():
        np.testing.assert_array_equal(answer[name], array, strict=True)
        assert answer[name].flags.aligned


def test_a_server_that_answers_in_json_is_understood(call: Calling, peer: Peer) -> None:
    peer.binary = False
    inputs = {"v": np.array([[1.5, 2.0]], np.float32), "s": np.array([["ä"]], object), "b": np.array([True])}
    (answer,) = call(peer.url, [lambda client: client.infer(inputs, "t")], key=KEY)
    np.testing.assert_array_equal(answer["v"], inputs["v"], strict=True)
    np.testing.assert_array_equal(answer["b"], inputs["b"], strict=True)
    assert answer["s"].tolist() == [["ä".encode()]]


def test_uint16_is_bfloat16_where_the_model_says_so_and_it_is_asked_once(call: Calling, peer: Peer) -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)
    answers = call(peer.url, [lambda client: client.infer({"half": bits, "other": bits}, "t")] * 2, key=KEY)
    assert [each["datatype"] for each in peer.heads[-1]["inputs"]] == ["BF16", "UINT16"]
    for answer in answers:
        np.testing.assert_array_equal(answer["half"], bits, strict=True)
        np.testing.assert_array_equal(answer["other"], bits, strict=True)
    assert peer.paths == ["/v2", "/v2/models/toy", *["/v2/models/t/infer"] * 2]


def test_rows_with_tasks_of_their_own_go_through_the_bundle(call: Calling, peer: Peer) -> None:
    tasks = ["ab", "abc@2", "base"]
    first, second = call(
        peer.url,
        [
            lambda client: client.infer({"x": X}, tasks=tasks),
            lambda client: client.infer({"x": X}, tasks=["ab", "cd", "ef"]),
        ],
        key=KEY,
    )
    assert peer.paths == ["/v2", "/v2/models/toy", *["/v2/models/toy/infer"] * 2]
    assert peer.values[0]["adapter"] == [b"ab", b"abc@2", b"base"]
    assert peer.heads[0]["inputs"][-1]["shape"] == [3]
    assert set(first) == {"logits", "hidden.0"}
    for row, (found, x) in enumerate(zip(first["logits"], X[:, 0], strict=True)):
        np.testing.assert_array_equal(found, np.full(len(tasks[row]), x), strict=True)
    np.testing.assert_array_equal(second["logits"], np.repeat(X, 2, axis=1), strict=True)
    for answer in (first, second):
        np.testing.assert_array_equal(answer["hidden.0"], X[:, 0], strict=True)


def test_what_else_is_asked_for_is_in_the_head(call: Calling, peer: Peer) -> None:
    call(
        peer.url,
        [
            lambda client: client.infer({"x": X}),
            lambda client: client.infer({"x": X}, "acme:t@7", outputs=["x"], timeout=2, priority=3),
        ],
        key=KEY,
        timeout=None,
    )
    plain, full = peer.heads
    assert plain["parameters"] == {"binary_data_output": True}
    assert "outputs" not in plain
    assert full["outputs"] == [{"name": "x", "parameters": {"binary_data": True}}]
    timeout = full["parameters"].pop("timeout")
    assert 1_000_000 < timeout <= 2_000_000
    assert full["parameters"] == {"binary_data_output": True, "priority": 3}
    assert peer.paths == ["/v2/models/base/infer", "/v2/models/acme:t/versions/7/infer"]


@pytest.mark.parametrize("value", [np.array([1j]), np.array(["2020"], "M8[Y]"), [None], [[1], [2, 3]], object()])
def test_what_the_protocol_cannot_carry_is_refused_before_it_is_sent(call: Calling, peer: Peer, value: object) -> None:
    with pytest.raises(InputError, match="send input 'v'"):
        call(peer.url, [lambda client: client.infer({"v": value}, "t")], key=KEY)
    assert not peer.paths


@pytest.mark.parametrize(
    "asked", [{"task": "a", "tasks": ["a"]}, {"tasks": "abc"}, {"task": "../x"}, {"task": ""}, {"task": "a@"}]
)
def test_wishes_that_make_no_sense_are_refused_before_they_are_sent(
    call: Calling, peer: Peer, asked: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        call(peer.url, [lambda client: client.infer({"x": X}, **asked)], key=KEY)
    assert not peer.paths


def test_the_key_comes_from_the_environment(call: Calling, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unauthenticated, match=r"^infer: no key$"):
        call(peer.url, [lambda client: client.infer({"x": X})])
    monkeypatch.setenv("TPEFT_KEY", KEY)
    (answer,) = call(peer.url, [lambda client: client.infer({"x": X})])
    np.testing.assert_array_equal(answer["x"], X, strict=True)


def test_a_refusal_that_is_not_the_servers_own_is_told_as_one(call: Calling, peer: Peer) -> None:
    with pytest.raises(NotFound, match=r"^ask for task 'x': expected a server of tpeft_deploy.*404"):
        call(peer.url, [lambda client: client.task("x")])


def test_many_requests_at_once_get_their_own_answers(peer: Peer) -> None:
    async def go() -> list[dict[str, Any]]:
        async with AsyncClient(peer.url, KEY) as client:
            return await asyncio.gather(*[client.infer({"x": X + row}, "t") for row in range(60)])

    for row, answer in enumerate(asyncio.run(go())):
        np.testing.assert_array_equal(answer["x"], X + row, strict=True)
