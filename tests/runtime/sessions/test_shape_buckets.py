from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.runtime.manifests import manifest
from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.bundle.slots import INDEX
from tpeft_deploy.runtime.sessions.shape_buckets import Bucket, Buckets, Recent, ladder
from tpeft_deploy.tucker import Array

TEXT = (
    Port("ids", "int64", ("batch", "sequence"), pad=9),
    Port("mask", "int64", ("batch", "sequence"), pad=0),
    Port("size", "float32", ("batch", "width")),
    Port("scale", "float32", (2,)),
)
SCORES = (Port("scores", "float32", ("batch", "sequence", 3)), Port("sums", "float32", ("batch", "width")))


def request(rows: int, length: int, width: int = 2) -> dict[str, Array]:
    return {
        "ids": np.arange(1, rows * length + 1).reshape(rows, length),
        "mask": np.ones((rows, length), np.int64),
        "size": np.ones((rows, width), np.float32),
        "scale": np.ones(2, np.float32),
    }


def test_rows_and_lengths_are_filled_up() -> None:
    buckets = Buckets(manifest(TEXT, SCORES), max_rows=8, lengths=[8, 4])
    inputs, index = request(3, 5), np.array([2, 1, 3])
    bucket = buckets.choose(inputs, index)
    assert bucket == Bucket((("batch", 4), ("sequence", 8), ("width", 2)), 4)
    filled = buckets.fill(bucket, inputs, index)
    ids = np.full((4, 8), 9)
    ids[3] = 0
    ids[:3, :5] = inputs["ids"]
    mask = np.zeros((4, 8), np.int64)
    mask[:3, :5] = 1
    np.testing.assert_array_equal(filled["ids"], ids)
    np.testing.assert_array_equal(filled["mask"], mask)
    np.testing.assert_array_equal(filled["size"], [[1, 1], [1, 1], [1, 1], [0, 0]])
    assert filled["scale"] is inputs["scale"]
    np.testing.assert_array_equal(filled[INDEX], [2, 1, 3, 0])
    assert {name: array.dtype for name, array in filled.items()} == {
        **{name: array.dtype for name, array in inputs.items()},
        INDEX: np.dtype(np.int64),
    }
    cuts = buckets.cuts(inputs)
    assert np.zeros((4, 8, 3))[cuts["scores"]].shape == (3, 5, 3)
    assert np.zeros((4, 2))[cuts["sums"]].shape == (3, 2)


@pytest.mark.parametrize(("rows", "filled"), [(1, 1), (2, 2), (3, 4), (5, 6), (6, 6), (7, 7), (40, 40)])
def test_rows_up_to_a_limit_that_is_no_power_of_two(rows: int, filled: int) -> None:
    bucket = Buckets(manifest(TEXT, SCORES), max_rows=6).choose(request(rows, 4), np.zeros(rows, np.int64))
    assert dict(bucket.sizes)["batch"] == filled
    assert bucket.indexed == filled


@pytest.mark.parametrize(("length", "filled"), [(1, 4), (4, 4), (5, 8), (8, 8), (9, 9)])
def test_lengths_beyond_the_last_stay_as_they_are(length: int, filled: int) -> None:
    bucket = Buckets(manifest(TEXT, SCORES), lengths=[4, 8]).choose(request(1, length), np.zeros(1, np.int64))
    assert dict(bucket.sizes)["sequence"] == filled


def test_no_lengths_are_assumed() -> None:
    bucket = Buckets(manifest(TEXT, SCORES)).choose(request(1, 5), np.zeros(1, np.int64))
    assert dict(bucket.sizes)["sequence"] == 5


def test_one_adapter_for_all_rows_is_a_bucket_of_its_own() -> None:
    buckets = Buckets(manifest(TEXT, SCORES))
    one, each = (buckets.choose(request(4, 5), np.zeros(n, np.int64)) for n in (1, 4))
    assert (one.indexed, each.indexed) == (1, 4)
    np.testing.assert_array_equal(buckets.fill(one, request(4, 5), np.array([3]))[INDEX], [3])


@pytest.mark.parametrize(
    "changed",
    [
        {"outputs": (Port("y", "float32", ("2*batch",)),)},  # cannot be cut back
        {"rows": "group"},
    ],
)
def test_rows_that_may_not_be_filled_up(changed: dict[str, object]) -> None:
    own = replace(manifest(TEXT, SCORES), **changed)  # type: ignore[arg-type]
    bucket = Buckets(own).choose(request(3, 5), np.zeros(3, np.int64))
    assert dict(bucket.sizes)["batch"] == 3


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (TEXT, (Port("y", "float32", ("batch", "sequence + 1")),)),
        ((*TEXT, Port("past", "float32", ("batch", "past + sequence"))), SCORES),
        ((replace(TEXT[0], pad=None), *TEXT[1:]), SCORES),
    ],
)
def test_lengths_that_may_not_be_filled_up(inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    buckets = Buckets(manifest(inputs, outputs), lengths=[8])
    bucket = buckets.choose({**request(2, 5), "past": np.zeros((2, 7), np.float32)}, np.zeros(1, np.int64))
    assert dict(bucket.sizes)["sequence"] == 5


def test_a_ladder_ends_at_the_limit() -> None:
    assert ladder(100) == [16, 24, 32, 48, 64, 96, 100]
    assert ladder(512)[-3:] == [256, 384, 512]
    assert ladder(10) == [10]
    for length in range(1, 101):
        assert min(step for step in ladder(100) if step >= length) <= max(16, length * 1.5)


def test_the_entries_used_last_stay() -> None:
    dropped: list[str] = []
    recent: Recent[int, str] = Recent(2, dropped.append)
    recent.put(1, "one")
    recent.put(2, "two")
    assert recent.get(1) == "one"
    recent.put(3, "three")
    assert dropped == ["two"]
    assert recent.get(2) is None
    recent.clear()
    assert (len(recent), sorted(dropped)) == (0, ["one", "three", "two"])
