"""A bundle says what its weights are without reading them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpeft_deploy import Adapter, Bundle, load_adapter
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import BaseMismatch, ShapeError


def test_shapes_and_digests_are_those_of_the_weights(conv_bundle: Bundle) -> None:
    view = conv_bundle.base_view
    for name in view.weights:
        assert view.shape(name) == view.weights[name].shape
        assert view.digest(name) == weight_digest(view.weights[name])


def test_an_adapter_is_checked_against_a_bundle_without_its_weights(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reading(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Bundle, "base_value", no_reading)
    own = conv_adapters["plain"]
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(own.to_bytes())
    assert load_adapter(file, base=conv_bundle.base_view).deltas.keys() == own.deltas.keys()
    name = next(iter(own.deltas))
    file.write_bytes(Adapter(own.deltas, base_digests={name: "0" * 64}).to_bytes())
    with pytest.raises(BaseMismatch, match=name):
        load_adapter(file, base=conv_bundle.base_view)
    other = next(delta for key, delta in own.deltas.items() if delta.shape != own.deltas[name].shape)
    file.write_bytes(Adapter({name: other}).to_bytes())
    with pytest.raises(ShapeError, match=name):
        load_adapter(file, base=conv_bundle.base_view)
