"""Where LyCORIS 4.1.3 disagrees with itself: what we read is its forward.  Section 7 of research/adapter-formats.md."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.wrapper import create_lycoris_from_weights
from torch import Tensor, nn

from tests.helpers.formats.trained import adapted, distance, lycoris_file, randomise
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import AdapterError
from tpeft_deploy.formats import load_adapter


def base() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"fc": nn.Linear(30, 40), "conv": nn.Conv2d(10, 12, 3, padding=1)})


def trained(path: Path, kind: type[nn.Module], on: str, **options: Any) -> tuple[nn.Module, Any, Path]:
    """A layer, a randomised LyCORIS module around it that is not applied, and its file."""
    layer = base()[on]
    wrapper = kind(f"lycoris_{on}", layer, **({"lora_dim": 4, "alpha": 1.0} | options))
    randomise(wrapper)
    return layer, wrapper.eval(), lycoris_file(path / "a.safetensors", {f"lycoris_{on}": wrapper})


def change(adapter: Adapter, on: str) -> Tensor:
    return torch.from_numpy(adapter.deltas[f"{on}.weight"].dense())


def forward_change(layer: nn.Module, wrapper: Any) -> Tensor:
    """dW of a linear layer as the module's forward applies it."""
    inputs = torch.eye(layer.get_parameter("weight").shape[1])
    with torch.no_grad():
        change: Tensor = wrapper(inputs) - layer(inputs)
    return change.T.double()


@pytest.mark.parametrize("kind", [LohaModule, LokrModule])  # factor 2 keeps LoKr's second half factored
def test_merge_to_of_loha_and_lokr_applies_the_scale_twice(tmp_path: Path, kind: type[nn.Module]) -> None:
    layer, wrapper, file = trained(tmp_path, kind, "fc", factor=2)
    forward, before = forward_change(layer, wrapper), layer.get_parameter("weight").detach().double().clone()
    assert distance(change(load_adapter(file, base=base()), "fc"), forward) <= 2e-5
    wrapper.merge_to()
    merged = layer.get_parameter("weight").detach().double() - before
    assert distance(merged, forward * 0.25) <= 1e-4, "merge_to no longer applies alpha / rank = 0.25 twice"


def test_lycoris_cannot_reload_its_own_tucker_lokr(tmp_path: Path) -> None:
    _, _, file = trained(tmp_path, LokrModule, "conv", use_tucker=True, lora_dim=2, factor=2)
    with pytest.raises((AttributeError, RuntimeError)):
        create_lycoris_from_weights(1.0, str(file), base())
    assert load_adapter(file, base=base()).deltas["conv.weight"].shape == (12, 10, 3, 3)


def test_lycoris_cannot_reload_its_own_ia3(tmp_path: Path) -> None:
    model = base()
    network = create_lycoris(model, algo="ia3")
    network.apply_to()
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, None)
    with pytest.raises(TypeError):
        create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), base())
    assert set(load_adapter(tmp_path / "a.safetensors", base=base()).gains) == {"fc.weight", "conv.weight"}


def test_rs_lora_of_glora_is_not_in_its_file(tmp_path: Path) -> None:
    layer, wrapper, file = trained(tmp_path, GLoRAModule, "fc", rs_lora=True)
    adapter = load_adapter(file, base=base())
    assert distance(2 * change(adapter, "fc"), forward_change(layer, wrapper)) <= 2e-5  # sqrt(4), as its reload
    assert "rs_lora" in adapter.notes["fc.weight"]


def test_rs_lora_of_a_full_lokr_is_not_read_back(tmp_path: Path) -> None:
    layer, wrapper, file = trained(tmp_path, LokrModule, "fc", rs_lora=True, full_matrix=True)
    adapter = load_adapter(file, base=base())
    assert distance(2 * change(adapter, "fc"), forward_change(layer, wrapper)) <= 2e-5  # sqrt(4)
    assert "rs_lora" in adapter.notes["fc.weight"]
    reloaded, _ = create_lycoris_from_weights(1.0, str(file), base())
    assert reloaded.loras[0].scale == 1.0


def test_dylora_trains_with_alpha_over_blocks_and_reloads_with_alpha_over_rank(tmp_path: Path) -> None:
    _, wrapper, file = trained(tmp_path, DyLoraModule, "conv", block_size=2)
    whole = wrapper.get_diff_weight(rank=2)[0]  # it adds the block after rank 2: both of its blocks
    adapter = load_adapter(file, base=base())
    assert distance(2 * change(adapter, "conv"), whole) <= 2e-5
    assert "alpha / blocks" in adapter.notes["conv.weight"]


def test_its_branch_ignores_the_padding_mode_and_its_merge_does_not(tmp_path: Path) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
    wrapper = LoConModule("lycoris_conv", layer, lora_dim=2, alpha=1.0)
    randomise(wrapper)
    file = lycoris_file(tmp_path / "a.safetensors", {"lycoris_conv": wrapper})
    model, x = nn.ModuleDict({"conv": copy.deepcopy(layer)}), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        ours = adapted(model, load_adapter(file, base=model)).get_submodule("conv")(x)
        forward = wrapper(x)
        wrapper.merge_to()
        merged = layer(x)
    assert distance(ours, merged) <= 2e-5
    assert distance(ours, forward) > 1e-2


def test_two_modules_of_one_underscore_name(tmp_path: Path) -> None:
    """LyCORIS silently trains one of them; whose tensors the file has cannot be known."""
    colliding = nn.Module()
    colliding.a_b = nn.Linear(4, 4)
    colliding.a = nn.Module()
    colliding.a.b = nn.Linear(4, 4)
    network = create_lycoris(colliding, algo="lora")
    assert isinstance(network, LycorisNetwork)
    assert len(network.loras) == 1
    network.apply_to()
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), None, None)
    with pytest.raises(AdapterError, match=r"lycoris_a_b.*expected one module.*got a\.b, a_b"):
        load_adapter(tmp_path / "a.safetensors", base=colliding)
