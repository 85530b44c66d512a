"""LyCORIS' algorithms that change whole tensors, channels or the base itself, and its own network and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lycoris import create_lycoris
from lycoris.modules import dylora
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.norms import NormModule
from torch import nn

from tests.helpers.formats.trained import KINDS, Net, distance, error_of, lycoris_file, net, randomise, rows, save
from tpeft_deploy.formats import load_adapter

DTYPES = {torch.float32: 2e-5, torch.float64: 1e-9}
UNGROUPED = [kind for kind in KINDS if kind not in {"grouped", "depthwise"}]
LAYER, NORM, HEAD = "lycoris_block_in_layer", "lycoris_block_in_norm", "lycoris_head"


def run(path: Path, model: Net, kind: str, wrappers: dict[str, Any], dtype: torch.dtype) -> float:
    """Randomise and apply LyCORIS modules, and measure the model read from their file against their forward."""
    x = rows(kind, dtype)
    for seed, wrapper in enumerate(wrappers.values()):
        wrapper.to(dtype).eval().apply_to()  # before it, LyCORIS' full would save diff minus the base
        randomise(wrapper, seed)
    file = lycoris_file(path / "adapter.safetensors", wrappers)
    with torch.no_grad():
        expected = model(x)
    return error_of(file, net(kind, dtype), x, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestForward:
    @pytest.mark.parametrize("kind", KINDS)
    def test_full(self, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
        model = net(kind, dtype)
        wrappers = {LAYER: FullModule(LAYER, model.block["in_layer"]), HEAD: FullModule(HEAD, model.head)}
        assert run(tmp_path, model, kind, wrappers, dtype) <= DTYPES[dtype]
        adapter = load_adapter(tmp_path / "adapter.safetensors", base=net(kind, dtype))
        assert "head.bias" in adapter.overrides
        assert adapter.deltas["head.weight"].factors == (None, None)

    def test_norms(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = net("linear", dtype)
        wrappers = {NORM: NormModule(NORM, model.block["in_norm"])}
        assert run(tmp_path, model, "linear", wrappers, dtype) <= DTYPES[dtype]

    @pytest.mark.parametrize("on_input", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_ia3(self, tmp_path: Path, kind: str, on_input: bool, dtype: torch.dtype) -> None:
        if on_input and kind in {"grouped", "depthwise"}:
            pytest.skip("LyCORIS cannot run it: its weight has all inputs, the layer's has inputs per group")
        model = net(kind, dtype)
        wrappers = {
            LAYER: IA3Module(LAYER, model.block["in_layer"], train_on_input=on_input),
            HEAD: IA3Module(HEAD, model.head, train_on_input=on_input),
        }
        assert run(tmp_path, model, kind, wrappers, dtype) <= DTYPES[dtype]

    @pytest.mark.parametrize("kind", UNGROUPED)
    def test_glora(self, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
        model = net(kind, dtype)
        wrappers = {
            LAYER: GLoRAModule(LAYER, model.block["in_layer"], lora_dim=3, alpha=1.5, use_scalar=True),
            HEAD: GLoRAModule(HEAD, model.head, lora_dim=3, alpha=1.5),
        }
        assert run(tmp_path, model, kind, wrappers, dtype) <= DTYPES[dtype]
        assert "rs_lora" in load_adapter(tmp_path / "adapter.safetensors", base=net(kind, dtype)).notes["head.weight"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_dylora_at_full_rank(
        self, tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Its forward draws a rank; with blocks of 1 the largest draw is the full rank, at scale alpha / rank.
        monkeypatch.setattr(dylora.random, "randint", lambda low, high: high)
        model = net(kind, dtype)
        wrappers = {LAYER: dylora.DyLoraModule(LAYER, model.block["in_layer"], lora_dim=4, alpha=1.5, block_size=1)}
        assert run(tmp_path, model, kind, wrappers, dtype) <= DTYPES[dtype]
        if kind != "linear":  # where its tensors look like any LoRA's
            notes = load_adapter(tmp_path / "adapter.safetensors", base=net(kind, dtype)).notes
            assert "DyLoRA" in notes["block.in_layer.weight"]


class TestFiles:
    """Modules of several algorithms in one file, and LyCORIS' own network, wrapper and 16 bit files."""

    @pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "full", "ia3", "glora"])
    def test_create_lycoris(self, tmp_path: Path, algo: str) -> None:
        model, x = net("conv2d"), rows("conv2d")
        network = create_lycoris(model, 1.0, linear_dim=3, linear_alpha=1.5, algo=algo, train_norm=True, conv_dim=2)
        network.apply_to()
        randomise(network.eval())
        with torch.no_grad():
            expected = model(x)
        network.save_weights(str(tmp_path / "adapter.safetensors"), None, {"ss_network_module": "lycoris.kohya"})
        assert error_of(tmp_path / "adapter.safetensors", net("conv2d"), x, expected) <= 2e-5

    def test_float16_file(self, tmp_path: Path) -> None:
        model, x = net("conv2d"), rows("conv2d")
        network = create_lycoris(model, 1.0, linear_dim=3, linear_alpha=1.5, algo="lora", dora_wd=True)
        network.apply_to()
        randomise(network.eval())
        with torch.no_grad():
            expected = model(x)
        network.save_weights(str(tmp_path / "adapter.safetensors"), torch.float16, None)
        assert error_of(tmp_path / "adapter.safetensors", net("conv2d"), x, expected) <= 2e-3

    def test_several_algorithms_in_one_file(self, tmp_path: Path) -> None:
        model = net("linear")
        wrappers: dict[str, nn.Module] = {
            LAYER: IA3Module(LAYER, model.block["in_layer"]),
            NORM: NormModule(NORM, model.block["in_norm"]),
            HEAD: FullModule(HEAD, model.head),
        }
        assert run(tmp_path, model, "linear", wrappers, torch.float32) <= 2e-5
        adapter = load_adapter(tmp_path / "adapter.safetensors", base=net("linear"))
        assert set(adapter.gains) == {"block.in_layer.weight"}
        assert set(adapter.overrides) == {"block.in_norm.weight", "block.in_norm.bias", "head.bias"}


class TestByHand:
    def test_glora_without_a_kernel_is_of_twice_its_rank(self, tmp_path: Path) -> None:
        layer = nn.Linear(40, 60)
        wrapper = GLoRAModule("fc", layer, lora_dim=3, alpha=1.5)
        randomise(wrapper)
        adapter = load_adapter(
            lycoris_file(tmp_path / "a.safetensors", {"fc": wrapper}), base=nn.ModuleDict({"fc": layer})
        )
        delta = adapter.deltas["fc.weight"]
        assert delta.ranks == (6, 6)
        assert distance(torch.from_numpy(delta.dense()), wrapper.get_diff_weight()[0]) <= 2e-6

    def test_a_diff_of_one_axis_is_an_override(self, tmp_path: Path) -> None:
        base = net("linear")
        diff = torch.arange(12.0)
        file = save(tmp_path / "a.safetensors", {"block.in_norm.diff": diff, "block.in_norm.diff_b": 2 * diff})
        adapter = load_adapter(file, base=base)
        assert not adapter.deltas
        np.testing.assert_array_equal(adapter.overrides["block.in_norm.weight"], 1 + diff.numpy())
        np.testing.assert_array_equal(adapter.overrides["block.in_norm.bias"], 2 * diff.numpy())

    def test_a_bias_difference_beside_lora(self, tmp_path: Path) -> None:
        base = net("linear")
        file = save(
            tmp_path / "a.safetensors",
            {
                "head.lora_up.weight": torch.ones(3, 2),
                "head.lora_down.weight": torch.ones(2, base.head.in_features),
                "head.diff_b": torch.tensor([1.0, 2.0, 3.0]),
            },
        )
        adapter = load_adapter(file, base=base)
        expected = base.head.bias.detach().numpy() + np.array([1, 2, 3], np.float32)
        np.testing.assert_allclose(adapter.overrides["head.bias"], expected, rtol=1e-6)
        assert distance(torch.from_numpy(adapter.deltas["head.weight"].dense()), torch.full((3, 90), 2.0)) == 0
