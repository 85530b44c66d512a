"""Which adapter answers a row: names in the path, the parameter, the header and the input."""

from __future__ import annotations

import numpy as np
import pytest

from tpeft_deploy.errors import NotFound, ProtocolError
from tpeft_deploy.runtime.server.operations.models import Resolved, resolve
from tpeft_deploy.runtime.server.v2.messages import InferRequest, ServedVersion

KNOWN = {("a", "mood", ""): "2", ("a", "mood", "1"): "1", ("a", "mood", "2"): "2", ("b", "mood", ""): "7"}


def find(tenant: str, name: str, version: str) -> ServedVersion:
    number = KNOWN.get((tenant, name, version))
    if number is None:
        raise NotFound(f"find model {name!r}")
    return ServedVersion(f"{tenant}/{name}@{number}", tenant, name, number, f"digest of {tenant} {number}")


def ask(tenant: str = "a", **fields: object) -> Resolved:
    request: dict[str, object] = {"model": "bundle", "inputs": {}}
    return resolve(find, "bundle", tenant, InferRequest(**(request | fields)))  # type: ignore[arg-type]


def names(*given: str) -> dict[str, np.ndarray]:
    array = np.empty(len(given), object)
    array[:] = [name.encode() for name in given]
    return {"adapter": array}


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({"model": "mood"}, ["a/mood@2"]),
        ({"model": "mood", "version": "1"}, ["a/mood@1"]),
        ({"model": "mood", "adapter": "mood"}, ["a/mood@2"]),
        ({"model": "mood", "tenant": "b"}, ["b/mood@7"]),
        ({"model": "base"}, ["base"]),
        ({"model": "base", "adapter": "mood"}, ["a/mood@2"]),
        ({"adapter": "mood@1"}, ["a/mood@1"]),
        ({"adapter": "base"}, ["base"]),
        ({"inputs": names("mood")}, ["a/mood@2"]),
        ({"inputs": names("mood", "base", "mood@1")}, ["a/mood@2", "base", "a/mood@1"]),
        ({"inputs": names("mood", "mood"), "adapter": "mood"}, ["a/mood@2", "a/mood@2"]),
    ],
)
def test_rows_run_on_what_was_named(fields: dict[str, object], keys: list[str]) -> None:
    resolved = ask(**fields)  # type: ignore[arg-type]
    assert [target.key for target in resolved.targets] == keys
    assert resolved.per_row == (len(keys) > 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected an input 'adapter'.*got neither"),
        ({"model": "mood", "adapter": "other"}, "'other' and model 'mood'"),
        ({"inputs": names("mood", "base"), "adapter": "mood"}, "'mood' and input 'adapter' with base, mood"),
        ({"inputs": {"adapter": np.zeros((1, 1), object)}}, r"shape \[1, 1\]"),
        ({"inputs": {"adapter": np.zeros(0, object)}}, r"shape \[0\]"),
        ({"inputs": {"adapter": np.zeros(2, np.int64)}}, "got int64"),
        ({"inputs": {"adapter": np.array([b"\xff"], object)}}, "UTF-8"),
    ],
)
def test_what_is_not_said_or_said_twice_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        ask(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "mood", "version": "9"}, "'mood'"),
        ({"model": "other"}, "'other'"),
        ({"version": "2", "adapter": "mood"}, "version 1"),
        ({"inputs": names("base", "other")}, "row 1.*'other'"),
        ({"model": "mood", "tenant": "c"}, "'mood'"),
    ],
)
def test_what_is_not_there_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(NotFound, match=message):
        ask(**fields)  # type: ignore[arg-type]
