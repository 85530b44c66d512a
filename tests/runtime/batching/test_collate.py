from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpeft_deploy.bundle.manifest import Manifest, Port, Varies
from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime.batching.collate import Joiner
from tpeft_deploy.tucker import Array

IDS = Port("ids", "int64", ("batch", "length"), pad=7)
MASK = Port("mask", "bool", ("batch", 1, "length", "length"), pad=0)
IMAGE = Port("image", "float32", ("batch", 2, "width"))
TOKENS = Port("tokens", "float16", ("batch", "length", 3))
SCORES = Port("scores", "float32", ("batch", 4), Varies(1, "head.weight"))
TAGS = Port("tags", "float32", ("batch", "length", 4), Varies(2, "head.weight"))


def manifest(inputs: tuple[Port, ...], outputs: tuple[Port, ...], rows: Any = "each") -> Manifest:
    return Manifest("net", "test", {}, {}, (), rows, "", inputs, outputs, {})


def text(rows: int, length: int, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "ids": random.integers(0, 1000, (rows, length)),
        "mask": random.integers(0, 2, (rows, 1, length, length)).astype(bool),
    }


def joiner(outputs: tuple[Port, ...] = (TOKENS,), max_waste: float = 0.5, rows: Any = "each") -> Joiner:
    return Joiner(manifest((IDS, MASK), outputs, rows), max_waste=max_waste)


def forms_fit(own: Joiner, *parts: dict[str, Array]) -> bool:
    form = own.form(parts[0], "base")
    assert form is not None
    for part in parts[1:]:
        other = own.form(part, "base")
        assert other is not None
        form = own.fits(form, other)
        if form is None:
            return False
    return True


def test_ragged_inputs_are_filled_up_at_the_end_and_keep_their_dtypes() -> None:
    parts = [text(2, 3, 0), text(1, 5, 1), text(1, 1, 2)]
    batch = joiner().join(parts)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "ids": ("int64", (4, 5)),
        "mask": ("bool", (4, 1, 5, 5)),
    }
    expected_ids = np.full((4, 5), 7)
    expected_mask = np.zeros((4, 1, 5, 5), bool)
    start = 0
    for part in parts:
        rows, length = part["ids"].shape
        for row in range(rows):
            for column in range(length):
                expected_ids[start + row, column] = part["ids"][row, column]
                for other in range(length):
                    expected_mask[start + row, 0, column, other] = part["mask"][row, 0, column, other]
        start += rows
    np.testing.assert_array_equal(batch["ids"], expected_ids)
    np.testing.assert_array_equal(batch["mask"], expected_mask)


def test_equal_sizes_are_only_stacked_and_one_request_is_not_copied() -> None:
    own = joiner()
    parts = [text(2, 3, 0), text(1, 3, 1)]
    np.testing.assert_array_equal(own.join(parts)["ids"], np.concatenate([part["ids"] for part in parts]))
    assert own.join(parts[:1])["ids"] is parts[0]["ids"]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=6), st.data())
def test_every_request_gets_back_exactly_what_its_rows_gave(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    """A model whose outputs are functions of single elements, so that the answer to a request alone is known."""
    own = joiner((TOKENS, SCORES, TAGS))
    parts = [text(rows, length, seed) for seed, (rows, length) in enumerate(sizes)]
    classes = [data.draw(st.integers(1, 5)) for _ in sizes]

    def model(inputs: dict[str, Array], heads: list[int]) -> dict[str, Array | list[Array]]:
        ids = inputs["ids"].astype(np.float32)
        return {
            "tokens": np.stack([ids, ids + 1, inputs["mask"][:, 0].any(-1)], axis=-1).astype(np.float16),
            "scores": [row[0] * np.arange(head, dtype=np.float32) for row, head in zip(ids, heads, strict=True)],
            "tags": [row[:, None] * np.arange(head, dtype=np.float32) for row, head in zip(ids, heads, strict=True)],
        }

    heads = [head for part, head in zip(parts, classes, strict=True) for _ in part["ids"]]
    answers = own.cut(model(own.join(parts), heads), parts)
    for part, head, answer in zip(parts, classes, answers, strict=True):
        expected = model(part, [head] * len(part["ids"]))
        assert list(answer) == ["tokens", "scores", "tags"]
        for name, array in answer.items():
            assert isinstance(array, np.ndarray)
            assert array.dtype == expected[name][0].dtype
            assert array.flags.c_contiguous
            np.testing.assert_array_equal(array, expected[name])


def test_answers_hold_no_memory_of_others() -> None:
    own = joiner()
    parts = [text(2, 3, 0), text(1, 3, 1)]
    tokens = np.zeros((3, 3, 3), np.float16)
    for answer in own.cut({"tokens": tokens}, parts):
        array = answer["tokens"]
        assert isinstance(array, np.ndarray)
        assert not np.shares_memory(array, tokens)
        assert array.base is None


def test_rows_of_different_tasks_stay_apart_where_it_was_asked_for() -> None:
    own = joiner((TOKENS, TAGS))
    parts = [text(2, 3, 0), text(1, 3, 1)]
    tags = [np.full((3, size), size, np.float32) for size in (2, 4, 4)]
    tokens = np.arange(27, dtype=np.float16).reshape(3, 3, 3)
    first, second = own.cut({"tokens": tokens, "tags": tags}, parts, apart=[True, False])
    assert isinstance(first["tags"], list)
    assert [row.shape for row in first["tags"]] == [(3, 2), (3, 4)]
    assert isinstance(second["tags"], np.ndarray)
    assert second["tags"].shape == (1, 3, 4)
    assert isinstance(first["tokens"], np.ndarray)
    alone = own.cut({"tokens": tokens[:2], "tags": tags[:2]}, parts[:1], apart=[True])
    assert isinstance(alone[0]["tags"], list)


@pytest.mark.parametrize("given_", [np.zeros((4, 3, 3)), np.zeros((3, 2, 3)), np.zeros((3, 3)), [np.zeros((3, 3))] * 2])
def test_outputs_of_other_sizes_than_the_manifest_says_are_refused(given_: Any) -> None:
    with pytest.raises(RunError, match=r"cut output 'tokens' of bundle 'net'.*expected \[3, 3, 3\]"):
        joiner().cut({"tokens": given_}, [text(2, 3), text(1, 2)])


def test_padding_is_at_most_the_given_share_of_the_whole_batch() -> None:
    no_mask = Joiner(manifest((IDS,), (TOKENS,)), max_waste=0.5)
    short, long = {"ids": text(1, 10)["ids"]}, {"ids": text(1, 1000)["ids"]}
    assert forms_fit(no_mask, short, long)  # 1010 of 2000
    assert not forms_fit(no_mask, short, short, long)  # 1020 of 3000
    assert forms_fit(no_mask, *[long] * 9, short)
    strict = Joiner(manifest((IDS,), (TOKENS,)), max_waste=0.0)
    assert forms_fit(strict, short, short)
    assert not forms_fit(strict, short, {"ids": text(1, 11)["ids"]})
    # The mask grows with the square of the length: 10 + 100 and 4 + 16 elements, of 220.
    assert forms_fit(joiner(), text(1, 10), text(1, 4))
    assert not forms_fit(joiner(max_waste=0.4), text(1, 10), text(1, 4))


def test_sizes_that_cannot_be_filled_up_have_to_be_equal() -> None:
    own = Joiner(manifest((IDS, IMAGE), (TOKENS,)), max_waste=0.5)

    def inputs(length: int, width: int) -> dict[str, Array]:
        return {"ids": text(1, length)["ids"], "image": np.zeros((1, 2, width), np.float32)}

    assert forms_fit(own, inputs(3, 8), inputs(4, 8))
    assert not forms_fit(own, inputs(3, 8), inputs(3, 9))
    # Another input of that size has no pad value.
    mixed = Joiner(manifest((IDS, Port("types", "int64", ("batch", "length"))), (SCORES,)), max_waste=0.5)
    parts = [{"ids": text(1, n)["ids"], "types": text(1, n)["ids"]} for n in (3, 4)]
    assert forms_fit(mixed, parts[0], parts[0])
    assert not forms_fit(mixed, *parts)
    # An output whose size follows from the padded one in a way that nothing says.
    pooled = Joiner(manifest((IDS,), (Port("pooled", "float32", ("batch", "length//2", 3)),)), max_waste=0.5)
    assert not forms_fit(pooled, *({"ids": part["ids"]} for part in parts))
    assert forms_fit(pooled, *[{"ids": parts[0]["ids"]}] * 2)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((IDS, Port("scale", "float32", (1,))), (TOKENS,)),
        ((IDS,), (Port("mean", "float32", (3,)),)),
        ((IDS,), (Port("similar", "float32", ("batch", "batch")),)),
        ((IDS,), (Port("pairs", "float32", ("batch", "2*batch - 1")),)),
        ((IDS,), (Port("halves", "float32", ("batch//2", 3)),)),
        ((Port("signal", "float32", (1, 3)),), (Port("wave", "float32", (1, 3)),)),
    ],
)
def test_models_that_mix_rows_run_each_request_alone(inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    own = Joiner(manifest(inputs, outputs), max_waste=0.5)
    arrays = {
        port.name: np.ones([3 if isinstance(size, str) else size for size in port.shape], port.dtype) for port in inputs
    }
    assert own.form(arrays, "base") is None
    assert own.rows(arrays) == (1 if inputs[0].name == "signal" else 3)
    answers = {port.name: np.ones(2) for port in outputs}
    assert own.cut(answers, [own.join([arrays])]) == [answers]


def test_a_model_of_one_adapter_per_run_joins_rows_of_one_task() -> None:
    own = joiner(rows="group")
    part = text(1, 3)
    first, again, other = (own.form(part, task) for task in ("a", "a", "b"))
    mixed, remixed = own.form(part, ("a", 0.5)), own.form(part, ("a", 0.5))
    assert first is not None
    assert again is not None
    assert other is not None
    assert mixed is not None
    assert remixed is not None
    assert own.fits(first, again)
    assert own.fits(mixed, remixed)
    assert own.fits(first, other) is None
    assert own.fits(first, mixed) is None


def test_a_pad_value_outlives_the_manifest_file() -> None:
    before = manifest((IDS, MASK, IMAGE), (TOKENS,))
    after = Manifest.from_json(before.to_json(), source="test")
    assert [port.pad for port in after.inputs] == [7, 0, None]
    assert after == before
