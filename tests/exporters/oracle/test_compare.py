"""A base that is a little off in ONNX Runtime is refused, with advice, or accepted by name; near ties are told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from tpeft_deploy import Adapter, TuckerDelta, export_bundle, export_folded, verify_bundle
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.cli import main
from tpeft_deploy.errors import ExportError, IntegrityError, NotEquivalent
from tpeft_deploy.exporters.bases import torch_module
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.bases.torch_module import TorchBase
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.runtime.folding.compare import limit_of
from tpeft_deploy.tucker import Array


class Net(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


INPUTS = {"x": torch.randn(2, 6, generator=torch.Generator().manual_seed(1))}


def adapter() -> Adapter:
    random = np.random.default_rng(0)
    factors = tuple(random.standard_normal((size, 2)) for size in (4, 6))
    return Adapter({"linear.weight": TuckerDelta(np.eye(2), factors)}, source="adapter")


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base 1.85e-5 away from what ONNX Runtime computes, with any weights."""
    own = TorchBase.reference

    def reference(*arguments: object) -> dict[str, Array]:
        return {name: array * np.float32(1 + 1.85e-5) for name, array in own(*arguments).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(TorchBase, "reference", reference)


@pytest.mark.usefixtures("off")
def test_a_stated_tolerance_is_suggested_accepted_and_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotEquivalent, match=r"base export .*The base itself.*--tolerance 3e-05"):
        export_bundle(Net(), {"task": adapter()}, tmp_path / "no", example_inputs=INPUTS)
    bundle = export_bundle(
        Net(), {"task": adapter()}, tmp_path / "b", example_inputs=INPUTS, tolerance=3e-5, folded=True
    )
    assert bundle.manifest.tolerance == 3e-5
    assert {check["limit"] for check in bundle.manifest.gate} == {3e-5}
    assert all(1.7e-5 < check["error"] < 2e-5 for check in bundle.manifest.gate)
    assert limit_of(bundle.manifest) == 6e-5
    assert limit_of(bundle.manifest, tf32=True) == 4e-3
    found = verify_bundle(tmp_path / "b")
    assert found.to_json()["tolerance"] == 3e-5
    assert {check.limit for check in found.checks} == {3e-5}
    assert main(["adapter", "list", str(tmp_path / "b"), "--json"], standalone_mode=False) in (0, None)
    assert json.loads(capsys.readouterr().out)["tolerance"] == 3e-5


@pytest.mark.usefixtures("off")
def test_a_folded_model_takes_a_tolerance_too(tmp_path: Path) -> None:
    with pytest.raises(NotEquivalent, match="relative error <= 1e-05"):
        export_folded(Net(), adapter(), tmp_path / "m.onnx", example_inputs=INPUTS)
    checks = export_folded(Net(), adapter(), tmp_path / "m.onnx", example_inputs=INPUTS, tolerance=3e-5)
    assert {check.limit for check in checks} == {3e-5}
    metadata = {prop.key: prop.value for prop in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert metadata["tpeft.limit"] == "3e-05"


@pytest.mark.parametrize("tolerance", [2e-3, 1e-6, float("nan")])
def test_a_tolerance_that_proves_nothing_is_refused(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(ExportError, match=r"expected a tolerance from 1e-05 to 0\.001"):
        export_bundle(Net(), {}, tmp_path / "b", example_inputs=INPUTS, tolerance=tolerance)
    with pytest.raises(ExportError, match=r"expected a tolerance from 1e-05 to 0\.001"):
        export_folded(Net(), adapter(), tmp_path / "m.onnx", example_inputs=INPUTS, tolerance=tolerance)


def test_a_manifest_states_no_tolerance_or_a_sane_one(tmp_path: Path) -> None:
    manifest = export_bundle(Net(), {}, tmp_path / "b", example_inputs=INPUTS).manifest
    assert manifest.tolerance is None
    with pytest.raises(IntegrityError, match="tolerance"):
        Manifest.from_json(replace(manifest, tolerance=0.5).to_json(), source="it")


def test_an_error_beyond_ten_times_the_limit_or_of_a_branch_gets_no_such_advice() -> None:
    right = np.ones(4)
    for form, error in (("base", 2e-4), ("folded", 2e-5)):
        check = compare.measure(form, "t", {}, lambda error=error: {"y": right * (1 + error)}, {"y": right})  # type: ignore[misc]
        assert check.failure is not None
        assert "tolerance" not in str(check.failure)


class Steps(nn.Module):
    """The embedding of a timestep, as diffusers computes it."""

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        exponent = -9.210340371976184 * torch.arange(0, 128, dtype=torch.float32) / 128
        angles = 1000 * timestep[:, None] * torch.exp(exponent)[None]
        return torch.cat([angles.sin(), angles.cos()], -1)


def test_frequencies_of_a_timestep_are_those_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> float:
        base = load_base(Steps(), example_inputs={"timestep": torch.linspace(0.5, 1, 40)})
        graph = base.graph()
        (tmp_path / "m.onnx").unlink(missing_ok=True)
        onnx.save(ir.to_proto(graph), tmp_path / "m.onnx")
        session = compare.open_session(tmp_path / "m.onnx")
        got = compare.run(session, base.inputs, {})
        return compare.relative_error(got["output"], base.reference(None, base.inputs, ["output"])["output"])

    assert error() < 2e-7
    monkeypatch.setattr(torch_module, "fold_functions", lambda model: None)
    assert error() > 1e-6


class Routed(nn.Module):
    """A linear layer for every row, chosen by the larger of two scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score, self.experts = nn.Linear(6, 3), nn.Linear(6, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.score(x).topk(1, -1).indices
        outputs = self.experts(x).view(-1, 3, 4)
        y: torch.Tensor = outputs.gather(1, chosen[..., None].expand(-1, -1, 4))
        return y


@pytest.mark.parametrize(("gap", "said"), [(1e-7, "Near ties explain it"), (0.1, "Near ties do not explain it")])
def test_near_ties_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: float, said: str) -> None:
    module = Routed()
    with torch.no_grad():  # scores 1, 1 - gap and 0, for every input
        module.score.weight.zero_()
        module.score.bias.copy_(torch.tensor([1.0, 1 - gap, 0.0]))
    own = TorchBase.reference

    def other_way(self: TorchBase, *arguments: object) -> dict[str, Array]:
        with torch.no_grad():
            module.score.bias[1] += 2 * gap
            try:
                return own(self, *arguments)  # type: ignore[arg-type]
            finally:
                module.score.bias[1] -= 2 * gap

    monkeypatch.setattr(TorchBase, "reference", other_way)
    with pytest.raises(
        NotEquivalent, match=f"base export .*{said}: on these inputs the last score that TopK"
    ) as raised:
        export_bundle(module, {}, tmp_path / "b", example_inputs=INPUTS)
    assert f"{gap:.0e}"[:2] in str(raised.value) or "1.2e-07" in str(raised.value)
