"""What 16 bits cost is measured on the base itself, stated in the bundle, and all that its exports may differ by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import nets
from tpeft_deploy import Adapter, Bundle, export_bundle, export_folded
from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.directory import MANIFEST
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.bundle.tolerances import ROUNDING_MULTIPLES, WIDEST_LIMIT
from tpeft_deploy.errors import NotEquivalent, UnsupportedBase
from tpeft_deploy.exporters.bases.torch_module import TorchBase
from tpeft_deploy.exporters.oracle.compare import measure
from tpeft_deploy.exporters.oracle.rounding import _worst_row
from tpeft_deploy.exporters.verify import verify_bundle
from tpeft_deploy.runtime.folding import compare


class Cancelling(nn.Module):
    """Adds a number and takes it away again: the larger it is, the more 16 bits lose, here and in a fused BatchNorm."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            nn.init.uniform_(self.norm.running_var, 0.05, 0.2)  # type: ignore[arg-type]
            self.norm.bias.fill_(offset)
            self.head.weight[:, 4:] = -self.head.weight[:, :4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = self.head(self.norm(self.stem(x)))
        return kept


def case(offset: float, dtype: torch.dtype = torch.float16) -> tuple[nn.Module, Adapter, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = Cancelling(offset).eval()
    made = nets.adapter_for(module, {"stem.weight": (2, 2, 2, 2), "head.weight": (2, 2, 1, 1)}, seed=1)
    return module.to(dtype), Adapter(made.deltas, source="a"), {"x": torch.randn(3, 3, 6, 5).to(dtype)}


def limits(bundle: Bundle) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for check in bundle.manifest.gate:
        found.setdefault(check["form"], set()).add(check["limit"])
    return found


def test_a_model_that_loses_more_is_held_to_what_it_loses_itself(tmp_path: Path) -> None:
    module, adapter, inputs = case(16.0)
    bundle = export_bundle(module, {"a": adapter}, tmp_path / "b", example_inputs=inputs, folded=True)
    rounding = bundle.manifest.rounding
    assert rounding is not None
    assert (rounding.dtype, rounding.reason) == ("float16", "")
    assert rounding.measured["output"] > 2e-3 / ROUNDING_MULTIPLES["float16"]
    limit = rounding.limits["output"]
    assert limit == ROUNDING_MULTIPLES["float16"] * rounding.measured["output"] < WIDEST_LIMIT
    assert max(check["error"] for check in bundle.manifest.gate) > 2e-3  # it was refused
    assert limits(bundle) == {
        form: {limit} for form in ("base", "factored", "banked", "banked.cuda", "mixed rows", "folded")
    }
    assert {check.limit for check in verify_bundle(bundle.path).checks} == {limit}
    assert compare.limit_of(bundle.manifest) == 2 * limit
    (check, *_) = export_folded(module, adapter, tmp_path / "folded.onnx", example_inputs=inputs)
    assert check.limit == limit


def test_an_export_that_is_wrong_is_found_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = slots.fill
    for place, (offset, wrong) in enumerate(((0.0, 1.05), (16.0, 1.5), (16.0, 0.0))):
        module, adapter, inputs = case(offset)
        monkeypatch.setattr(slots, "fill", lambda *args, wrong=wrong: {k: wrong * v for k, v in honest(*args).items()})
        with pytest.raises(NotEquivalent, match="factored"):
            export_bundle(module, {"a": adapter}, tmp_path / str(place), example_inputs=inputs)


def test_a_model_that_loses_little_and_one_in_32_bits_are_held_to_what_they_were(tmp_path: Path) -> None:
    little = nn.Linear(16, 4).half()
    bundle = export_bundle(little, {}, tmp_path / "b", example_inputs={"input": torch.randn(3, 16).half()})
    assert bundle.manifest.rounding is not None
    assert 0 < bundle.manifest.rounding.measured["output"] < 5e-4
    assert set.union(*limits(bundle).values()) == {2e-3}
    module, _, inputs = case(16.0, torch.float32)
    assert export_bundle(module, {}, tmp_path / "c", example_inputs=inputs).manifest.rounding is None


def test_in_bfloat16_only_what_is_stored_rounded_is_excused(tmp_path: Path) -> None:
    module, adapter, inputs = case(16.0, torch.bfloat16)
    bundle = export_bundle(module, {"a": adapter}, tmp_path / "b", example_inputs=inputs, folded=True)
    rounding = bundle.manifest.rounding
    assert rounding is not None
    limit = max(1.6e-2, min(ROUNDING_MULTIPLES["bfloat16"] * rounding.measured["output"], WIDEST_LIMIT))
    assert limits(bundle)["folded"] == {limit}
    assert max(limits(bundle)["factored"]) < 1e-3


def test_where_torch_cannot_run_16_bits_the_limits_are_the_fixed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unable(*_: object) -> None:
        raise UnsupportedBase("run it", problem="no kernel")

    monkeypatch.setattr(TorchBase, "in_both", unable)
    module, adapter, inputs = case(0.0)
    bundle = export_bundle(module, {"a": adapter}, tmp_path / "b", example_inputs=inputs)
    rounding = bundle.manifest.rounding
    assert rounding is not None
    assert (dict(rounding.measured), dict(rounding.limits), rounding.reason) == ({}, {"output": 2e-3}, "no kernel")
    assert "no kernel" in caplog.text
    assert set.union(*limits(bundle).values()) == {2e-3}


def test_a_torch_operator_without_a_16_bit_kernel_is_told() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = torch.linalg.inv(x * self.scale)
            return found

    base = TorchBase("fails", Fails().half(), {"x": torch.eye(3).half()}, {})
    with pytest.raises(UnsupportedBase, match="run fails in 16 bits on the CPU"):
        base.in_both(base.inputs, ["output"])


def test_a_bundle_that_states_nothing_is_held_to_the_fixed_limits(tmp_path: Path) -> None:
    module, adapter, inputs = case(16.0)
    bundle = export_bundle(module, {"a": adapter}, tmp_path / "b", example_inputs=inputs)
    text = replace(bundle.manifest, rounding=None).to_json()
    assert Manifest.from_json(text, source="it").rounding is None
    assert Manifest.from_json(bundle.manifest.to_json(), source="it") == bundle.manifest
    (bundle.path / MANIFEST).write_text(text)
    assert json.loads(text)["rounding"] is None
    with pytest.raises(NotEquivalent, match=r"error <= 0\.002"):
        verify_bundle(bundle.path)
    assert compare.limit_of(Bundle.open(bundle.path).manifest) == pytest.approx(4e-3)


def test_the_worst_row_counts_and_each_output_has_a_limit_of_its_own() -> None:
    expected = np.array([[100.0, 0.0], [1.0, 0.0]])
    got = np.array([[100.0, 0.0], [1.1, 0.0]])
    assert _worst_row(got, expected) == pytest.approx(0.1)
    assert np.isnan(_worst_row(np.array([np.nan, 1.0]), np.ones(2)))
    outputs = {"loose": got[1:], "tight": np.ones(3) + 1e-3}
    wanted = {"loose": expected[1:], "tight": np.ones(3)}
    check = measure("factored", "a", {}, lambda: outputs, wanted, {"loose": 0.2, "tight": 1e-4})
    assert check.limit == 1e-4
    assert check.error == pytest.approx(1e-3)
    assert check.failure is not None
    assert "'tight'" in str(check.failure)
    assert measure("factored", "a", {}, lambda: outputs, wanted, {"loose": 0.2, "tight": 1e-2}).failure is None
