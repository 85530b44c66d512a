"""The three layouts of FLoRA's authors, written by minimal modules after their sources (they cannot be installed)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.formats.trained import KINDS, distance, error_of, net, randomise, rows, save
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import AdapterError, FormatError
from tpeft_deploy.formats import load_adapter

DTYPES = {torch.float32: 2e-5, torch.float64: 1e-9}


class FLoRALayer(nn.Module):
    """flora/layers.py: a core and a factor for each of [in, out, *kernel]; the scale is an attribute only."""

    def __init__(self, dims: list[int], ranks: list[int], scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.param_G = nn.Parameter(torch.randn(*ranks))
        for axis, (size, rank) in enumerate(zip(dims, ranks, strict=True)):
            self.register_parameter(f"param_{axis}", nn.Parameter(torch.randn(size, rank)))

    def weight(self) -> Tensor:
        n = self.param_G.dim()
        core, sizes = "abcde"[:n], "vwxyz"[:n]
        factors = [getattr(self, f"param_{axis}") for axis in range(n)]
        terms = ",".join([core, *(size + rank for size, rank in zip(sizes, core, strict=True))])
        return torch.einsum(f"{terms}->{sizes}", self.param_G, *factors).transpose(0, 1) * self.scale


class Wrapped(nn.Module):
    """Takes the place of a layer: base_layer and flora_layer side by side."""

    def __init__(self, layer: Any, ranks: list[int], scale: float) -> None:
        super().__init__()
        self.base_layer = layer
        outputs, inputs, *kernel = layer.weight.shape
        self.flora_layer = FLoRALayer([inputs, outputs, *kernel], ranks, scale)

    def forward(self, x: Tensor) -> Tensor:
        base, weight = self.base_layer, self.flora_layer.weight()
        y: Tensor = base(x)
        if isinstance(base, nn.Linear):
            return y + functional.linear(x, weight)
        apply = {4: functional.conv2d, 5: functional.conv3d}[weight.dim()]
        return y + apply(x, weight, None, base.stride, base.padding, base.dilation, base.groups)


class Wrapper(nn.Module):
    """flora/flora.py: the model under the name `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


def sjtu(kind: str, dtype: torch.dtype, scale: float, wraps: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """State and outputs of a trained model of the SJTU layout."""
    model, x = net(kind, dtype), rows(kind, dtype)
    modes = model.get_parameter("block.in_layer.weight").dim()
    wrapped = Wrapped(model.block["in_layer"], [3, 4, 2, 2, 1][:modes], scale).to(dtype)
    randomise(wrapped.flora_layer)
    model.block["in_layer"] = wrapped
    whole: nn.Module = model
    for _ in range(wraps):
        whole = Wrapper(whole)
    with torch.no_grad():
        return whole.state_dict(), whole(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wraps", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d-1x1", "conv3d"])
def test_sjtu(tmp_path: Path, kind: str, wraps: int, dtype: torch.dtype) -> None:
    state, expected = sjtu(kind, dtype, 4.0, wraps)
    file = save(tmp_path / "flora.safetensors", state)
    assert error_of(file, net(kind, dtype), rows(kind, dtype), expected, scale=4.0) <= DTYPES[dtype]
    adapter = load_adapter(file, base=net(kind, dtype), scale=4.0)
    assert set(adapter.deltas) == {"block.in_layer.weight"}
    assert not adapter.overrides, "copies of the base are no part of the adapter"


class TestSjtu:
    def test_scale_is_demanded(self, tmp_path: Path) -> None:
        file = save(tmp_path / "flora.safetensors", sjtu("conv2d", torch.float32, 1.0)[0])
        with pytest.raises(FormatError, match=r"do not record the scale.*Give scale="):
            load_adapter(file, base=net("conv2d"))

    def test_a_trained_head_is_an_override(self, tmp_path: Path) -> None:
        state, _ = sjtu("conv2d", torch.float32, 1.0)
        state = state | {"model.head.bias": torch.tensor([1.0, 2.0, 3.0])}
        adapter = load_adapter(save(tmp_path / "flora.safetensors", state), base=net("conv2d"), scale=1.0)
        assert set(adapter.overrides) == {"head.bias"}

    def test_another_base_is_refused(self, tmp_path: Path) -> None:
        file = save(tmp_path / "flora.safetensors", sjtu("conv2d", torch.float32, 1.0)[0])
        with pytest.raises(AdapterError, match=r"block\.in_layer\.weight.*another base"):
            load_adapter(file, base=net("conv2d", seed=5), scale=1.0)

    def test_a_missing_factor(self, tmp_path: Path) -> None:
        state, _ = sjtu("conv2d", torch.float32, 1.0)
        state = {name: tensor for name, tensor in state.items() if not name.endswith("param_2")}
        with pytest.raises(FormatError, match=r"expected a tensor flora_layer\.param_2"):
            load_adapter(save(tmp_path / "flora.safetensors", state), base=net("conv2d"), scale=1.0)

    def test_one_factor_too_many(self, tmp_path: Path) -> None:
        state, _ = sjtu("conv2d", torch.float32, 1.0)
        state["model.block.in_layer.flora_layer.param_4"] = torch.ones(2, 2)
        with pytest.raises(FormatError, match=r"flora_layer\.param_4"):
            load_adapter(save(tmp_path / "flora.safetensors", state), base=net("conv2d"), scale=1.0)

    def test_its_grouped_convolutions_cannot_run_and_are_refused(self, tmp_path: Path) -> None:
        """SJTU-DeepVisionLab/FLoRA#3: dims are taken from in_channels, not from the weight."""
        kind = KINDS["grouped"]
        layer = kind.build()
        broken = Wrapped(layer, [3, 4, 2, 2], 1.0)
        broken.flora_layer = FLoRALayer([40, 12, 3, 3], [3, 4, 2, 2], 1.0)
        with pytest.raises(RuntimeError, match="groups"):
            broken(torch.randn(1, *kind.row))
        state = {f"model.block.in_layer.{name}": tensor for name, tensor in broken.state_dict().items()}
        with pytest.raises(AdapterError, match=r"\(12, 10, 3, 3\), got \(12, 40, 3, 3\)"):
            load_adapter(save(tmp_path / "flora.safetensors", state), base=net("grouped"), scale=1.0)


class LoralibLinear(nn.Linear):
    """loralib/layers_flora.py: dW = B E A * alpha / (ranknum + 1e-5)."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float) -> None:
        super().__init__(inputs, outputs)
        self.alpha = alpha if alpha > 0 else float(rank)
        self.lora_A = nn.Parameter(torch.randn(rank, inputs))
        self.lora_E = nn.Parameter(torch.randn(rank, rank))
        self.lora_B = nn.Parameter(torch.randn(outputs, rank))
        self.ranknum = nn.Parameter(torch.tensor([float(rank)]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        change = self.lora_B @ self.lora_E @ self.lora_A * self.alpha / (self.ranknum + 1e-5)
        return super().forward(x) + functional.linear(x, change)


def loralib(dtype: torch.dtype, alpha: float) -> tuple[dict[str, Tensor], Tensor]:
    """The adapter's tensors alone, and outputs."""
    model = net("linear", dtype)
    layer = LoralibLinear(12, 18, 3, alpha).to(dtype)
    layer.load_state_dict(model.block["in_layer"].state_dict(), strict=False)
    model.block["in_layer"] = layer
    with torch.no_grad():
        return model.state_dict(), model(rows("linear", dtype))


def only_adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "lora_" in name or "ranknum" in name}


class TestLoralib:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("alpha", "scale"), [(-1.0, None), (6.0, 2.0)])
    def test_forward(self, tmp_path: Path, alpha: float, scale: float | None, dtype: torch.dtype) -> None:
        state, expected = loralib(dtype, alpha)
        for name, tensors in (("whole", state), ("alone", only_adapter(state))):
            file = save(tmp_path / f"{name}.safetensors", tensors)
            assert error_of(file, net("linear", dtype), rows("linear", dtype), expected, scale) <= DTYPES[dtype]
            adapter = load_adapter(file, base=net("linear", dtype), scale=scale)
            assert set(adapter.deltas) == {"block.in_layer.weight"}
            assert not adapter.overrides

    def test_the_guessed_alpha_is_said(self, tmp_path: Path) -> None:
        file = save(tmp_path / "a.safetensors", only_adapter(loralib(torch.float32, -1)[0]))
        adapter = load_adapter(file)
        assert "alpha is taken to be the rank" in adapter.notes["block.in_layer.weight"]
        assert adapter.deltas["block.in_layer.weight"].scale == pytest.approx(3 / (3 + 1e-5), rel=1e-12)

    def test_a_merged_weight_is_refused(self, tmp_path: Path) -> None:
        state, _ = loralib(torch.float32, -1)
        state["block.in_layer.weight"] = state["block.in_layer.weight"] + 1
        with pytest.raises(AdapterError, match="perhaps with adapters merged"):
            load_adapter(save(tmp_path / "a.safetensors", state), base=net("linear"))

    def test_a_ranknum_of_zero(self, tmp_path: Path) -> None:
        state = only_adapter(loralib(torch.float32, -1)[0])
        state["block.in_layer.ranknum"] = torch.zeros(1)
        with pytest.raises(FormatError, match="one positive number as ranknum"):
            load_adapter(save(tmp_path / "a.safetensors", state), base=net("linear"))


CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "fan_in_fan_out": False, "enable_lora": None, "bias": "none"}


def cr_mr(path: Path, transposed: bool = False, **config: Any) -> tuple[Path, nn.Module, Tensor]:
    """A directory of the PEFT fork, its base and the adapted weight of `fc`, which is stored (I, O) if transposed."""
    torch.manual_seed(3)
    a, e, b = torch.randn(3, 30), torch.randn(3, 3), torch.randn(40, 3)
    base = nn.ModuleDict({"fc": nn.Linear(40, 30) if transposed else nn.Linear(30, 40)})
    change = (b.double() @ e.double() @ a.double()) * 2
    weight = base.get_parameter("fc.weight").detach().double() + (change.T if transposed else change)
    path.mkdir(exist_ok=True)
    tensors = {"lora_A": a, "lora_E": e, "lora_B": b}
    save_file(
        {f"base_model.model.fc.{name}.weight": tensor for name, tensor in tensors.items()},
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | {"fan_in_fan_out": transposed} | config))
    return path, base, weight


class TestCrMr:
    @pytest.mark.parametrize("transposed", [False, True])
    def test_forward(self, tmp_path: Path, transposed: bool) -> None:
        path, base, expected = cr_mr(tmp_path / "a", transposed)
        adapter = load_adapter(path, base=base)
        got = adapter.merged("fc.weight", base.get_parameter("fc.weight").detach().numpy())
        assert distance(torch.from_numpy(got), expected) <= 1e-9

    def test_it_is_not_plain_lora(self, tmp_path: Path) -> None:
        path, base, _ = cr_mr(tmp_path / "a")
        delta = load_adapter(path, base=base, format="flora-cr-mr").deltas["fc.weight"]
        assert delta.ranks == (3, 3)
        assert abs(delta.core - torch.eye(3).numpy()).max() > 0.1

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"enable_lora": [True, False]}, "expected enable_lora null"),
            ({"r": 8}, "expected r 8.*got rank 3"),
            ({"lora_alpha": None}, "a finite lora_alpha"),
        ],
    )
    def test_refusals(self, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        path, base, _ = cr_mr(tmp_path / "a", **config)
        with pytest.raises(FormatError, match=message):
            load_adapter(path, base=base)

    def test_without_its_configuration(self, tmp_path: Path) -> None:
        path, base, expected = cr_mr(tmp_path / "a")
        file = (path / "adapter_model.safetensors").rename(tmp_path / "alone.safetensors")
        with pytest.raises(FormatError, match=r"adapter_config\.json.*scale=, lora_alpha / r"):
            load_adapter(file, base=base)
        adapter = load_adapter(file, base=base, scale=2.0)
        got = adapter.merged("fc.weight", base.get_parameter("fc.weight").detach().numpy())
        assert distance(torch.from_numpy(got), expected) <= 1e-9


def test_digests_come_from_the_copy_of_the_base(tmp_path: Path) -> None:
    file = save(tmp_path / "flora.safetensors", sjtu("conv2d", torch.float32, 1.0)[0])
    base = net("conv2d")
    digests = load_adapter(file, base=base, scale=1.0).base_digests
    weight = base.get_parameter("block.in_layer.weight").detach().numpy()
    assert digests == {"block.in_layer.weight": weight_digest(weight)}
