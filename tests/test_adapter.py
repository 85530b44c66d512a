from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import nets
from tpeft_deploy import Adapter
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import BaseMismatch, FormatError, ShapeError, UnknownTarget
from tpeft_deploy.formats import canonical

GAIN = np.full((4, 1), 1.5, np.float32)
DELTA = nets.delta((4, 3), (2, 2), seed=0)


def test_the_canonical_file_is_exact_and_repeatable(conv_adapters: dict[str, Adapter]) -> None:
    for adapter in conv_adapters.values():
        data = adapter.to_bytes()
        assert data == adapter.to_bytes()
        read = canonical.from_bytes(data, source="a test")
        assert read.to_bytes() == data
        assert dict(read.base_digests) == dict(adapter.base_digests)
        for name, delta in adapter.deltas.items():
            np.testing.assert_array_equal(read.deltas[name].dense(), delta.dense())
        for name, array in adapter.overrides.items():
            np.testing.assert_array_equal(read.overrides[name], array)


def test_gains_and_scalars_survive_the_file() -> None:
    steps = np.asarray(7)
    adapter = Adapter({"w": DELTA}, {"norm.num_batches_tracked": steps}, gains={"w": GAIN, "v": GAIN.T})
    read = canonical.from_bytes(adapter.to_bytes(), source="a test")
    assert read.to_bytes() == adapter.to_bytes()
    assert read.overrides["norm.num_batches_tracked"].shape == ()
    np.testing.assert_array_equal(read.gains["v"], GAIN.T)
    assert read.parameters == adapter.parameters == DELTA.parameters + 9
    assert read.nbytes == DELTA.nbytes + steps.nbytes + 2 * GAIN.nbytes


def test_a_gain_multiplies_the_sum() -> None:
    weight = np.arange(12.0).reshape(4, 3)
    adapter = Adapter({"w": DELTA}, gains={"w": GAIN, "v": GAIN})
    np.testing.assert_allclose(adapter.merged("w", weight), 1.5 * (weight + DELTA.dense()))
    np.testing.assert_allclose(adapter.merged("v", weight), 1.5 * weight)


def test_the_digest_depends_on_everything() -> None:
    other = nets.delta((4, 3), (2, 2), seed=0, scale=0.8)
    files = {
        Adapter({"w": DELTA}).to_bytes(),
        Adapter({"w": other}).to_bytes(),
        Adapter({"v": DELTA}).to_bytes(),
        Adapter({"w": DELTA}, base_digests={"w": "0" * 64}).to_bytes(),
        Adapter({"w": DELTA}, {"b": np.zeros(4, np.float32)}).to_bytes(),
        Adapter({"w": DELTA}, gains={"w": GAIN}).to_bytes(),
    }
    assert len(files) == 6


def test_a_weight_has_one_digest_in_any_precision_that_holds_it() -> None:
    weight = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    weight[0, 0] = 1e6
    small = np.clip(weight, -1e4, 1e4)
    half = small.astype(np.float16)
    assert weight_digest(half) == weight_digest(half.astype(np.float32)) == weight_digest(small)
    assert weight_digest(weight) != weight_digest(small)
    assert weight_digest(weight) != weight_digest(weight.T)


@pytest.mark.parametrize(
    ("deltas", "overrides", "gains", "problem"),
    [
        ({}, {}, {}, "no tensors at all"),
        ({"w": DELTA}, {"w": np.zeros((4, 3), np.float32)}, {}, "a delta or an override, got both"),
        ({}, {"w": np.zeros((4, 3), np.float32)}, {"w": GAIN}, "a gain or an override, got both"),
        ({"w": DELTA}, {"b": np.array([np.inf], np.float32)}, {}, "override 'b'.*NaN or infinity"),
        ({"w": DELTA}, {}, {"w": np.array([[np.nan]], np.float32)}, "gain 'w'.*NaN or infinity"),
        ({"w": DELTA}, {}, {"w": np.array([[2]])}, "gain 'w'.*floating point"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(deltas: dict, overrides: dict, gains: dict, problem: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(FormatError, match=problem):
        Adapter(deltas, overrides, gains=gains)


def test_an_adapter_must_fit_its_base() -> None:
    adapter = Adapter({"layer.weight": DELTA}, {"head.bias": np.zeros(2, np.float32)}, {"layer.weight": "a" * 64})
    shapes = {"layer.weight": (4, 3), "head.bias": (10,)}
    adapter.check_shapes(shapes, base="a base")
    with pytest.raises(UnknownTarget, match=r"'layer.weight'.*Did you mean 'layers.weight'"):
        adapter.check_shapes({"layers.weight": (4, 3), "head.bias": (10,)}, base="a base")
    with pytest.raises(ShapeError, match=r"expected a change of shape \(4, 4\), got \(4, 3\)"):
        adapter.check_shapes(shapes | {"layer.weight": (4, 4)}, base="a base")
    with pytest.raises(ShapeError, match=r"override 'head.bias'"):
        adapter.check_shapes(shapes | {"head.bias": (10, 1)}, base="a base")
    gained = Adapter({}, gains={"layer.weight": GAIN})
    gained.check_shapes(shapes, base="a base")
    with pytest.raises(UnknownTarget, match=r"gain 'layer.weight'"):
        gained.check_shapes({"head.bias": (10,)}, base="a base")
    for shape in ((3, 4), (4,), (4, 3, 1)):
        with pytest.raises(ShapeError, match=r"gain 'layer.weight'.*broadcasts"):
            gained.check_shapes({"layer.weight": shape}, base="a base")
    adapter.check_digests({"layer.weight": "a" * 64, "other": "b"}, base="a base")
    with pytest.raises(BaseMismatch, match="trained on another base, expected base weight aaaaaaaaaaaa"):
        adapter.check_digests({"layer.weight": "b" * 64}, base="a base")


def test_a_tensor_of_no_target_is_refused() -> None:
    from safetensors.numpy import load, save

    data = Adapter({"w": DELTA}).to_bytes()
    tensors = load(data) | {"delta/v/core": np.zeros((1, 1), np.float32)}
    metadata = {"tpeft": '{"schema": 1, "scales": {"w": 1.0}, "base_digests": {}}'}
    with pytest.raises(FormatError, match="'delta/v/core'"):
        canonical.from_bytes(save(tensors, metadata=metadata), source="a test")


def test_damaged_canonical_files_are_refused() -> None:
    data = Adapter({"w": DELTA}).to_bytes()
    for damaged in (b"", data[:7], data[: len(data) // 2], data[:-1], b"\xff" * 64, b"PK" + data):
        with pytest.raises(FormatError, match="read a test"):
            canonical.from_bytes(damaged, source="a test")
