"""What `convert` writes for other tools: read back it is the same adapter, and those tools compute the same with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import nets
from tpeft_deploy import Adapter
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.formats.read.base_view import view
from tpeft_deploy.formats.write import locon as to_locon
from tpeft_deploy.formats.write import peft_lora as to_peft_lora


class Mixed(nn.Module):
    """A layer of every kind that LoRA tools know: (B, 5) tokens -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.block = nn.ModuleList([nn.Linear(12, 12), nn.Conv1d(12, 10, 3, stride=2, padding=1)])
        self.image = nn.Conv2d(10, 9, (1, 2), padding=1)
        self.volume = nn.Conv3d(9, 8, (2, 1, 2), padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.block[0](self.embed(ids)).transpose(1, 2)
        x = self.image(torch.tanh(self.block[1](x))[:, :, None])
        x = self.volume(torch.tanh(x)[:, :, None])
        y: torch.Tensor = self.head(self.norm(x.mean((2, 3, 4))))
        return y


TARGETS = {
    "embed.weight": (3, 2),
    "block.0.weight": (2, 4),
    "block.1.weight": (3, 2, 3),
    "image.weight": (2, 3, 1, 2),
    "volume.weight": (2, 2, 2, 1, 1),
}
OVERRIDES = {"head.weight": (3, 8), "head.bias": (3,), "norm.weight": (8,), "block.0.bias": (12,)}


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture
def adapter() -> Adapter:
    return nets.adapter_for(mixed(), TARGETS, seed=3, overrides=OVERRIDES)


def merged(base: nn.Module, adapter: Adapter) -> nn.Module:
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in adapter.deltas.items():
            parameters[name].copy_(parameters[name].double() + torch.from_numpy(delta.dense()))
        for name, array in adapter.overrides.items():
            parameters[name].copy_(torch.from_numpy(array))
    return model


def assert_same(got: Adapter, expected: Adapter, base: nn.Module) -> None:
    """Every change as exact as 1e-6, and the same model with it: a whole tensor may come back as a change."""
    for name, delta in expected.deltas.items():
        dense = delta.dense()
        assert np.linalg.norm(got.deltas[name].dense() - dense) <= 1e-6 * np.linalg.norm(dense), name
    one, other = (merged(base, adapter).state_dict() for adapter in (got, expected))
    for name, tensor in other.items():
        assert (one[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


def test_ours_to_peft_lora_and_back(tmp_path: Path, adapter: Adapter) -> None:
    base = mixed()
    to_peft_lora.write(adapter, tmp_path / "lora", base=view(base))
    assert_same(load_adapter(tmp_path / "lora", base=base), adapter, base)


def test_peft_itself_computes_the_same(tmp_path: Path, adapter: Adapter) -> None:
    from peft import PeftModel

    base = mixed()
    to_peft_lora.write(adapter, tmp_path / "lora", base=view(base))
    ids = torch.randint(0, 11, (4, 5))
    with torch.no_grad():
        expected = merged(base, adapter)(ids)
        plain = base(ids)
        got = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()(ids)
    assert (plain - expected).norm() > 1e-2 * expected.norm()
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_ours_to_locon_and_back(tmp_path: Path, adapter: Adapter) -> None:
    base = mixed()
    to_locon.write(adapter, tmp_path / "a.safetensors", base=view(base))
    assert_same(load_adapter(tmp_path / "a.safetensors", base=base), adapter, base)


@pytest.mark.parametrize(("name", "ranks"), [(name, TARGETS[name]) for name in TARGETS if name != "embed.weight"])
def test_lycoris_itself_computes_the_same(tmp_path: Path, name: str, ranks: tuple[int, ...]) -> None:
    from lycoris.modules.locon import LoConModule
    from safetensors.torch import load_file

    base = mixed()
    adapter = nets.adapter_for(base, {name: ranks}, seed=5)
    to_locon.write(adapter, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    key = f"lycoris_{name.removesuffix('.weight').replace('.', '_')}"
    parts = [
        tensors.pop(f"{key}.{part}", None)
        for part in ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale")
    ]
    assert not tensors
    module = LoConModule.make_module_from_state_dict(key, base.get_submodule(name.removesuffix(".weight")), *parts)
    difference, _ = module.get_diff_weight(1.0)
    expected = adapter.deltas[name].dense()
    got = difference.detach().double().numpy().reshape(expected.shape)
    assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)


def test_a_convolution_uses_lora_mid_where_that_is_smaller(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    adapter = Adapter({"c.weight": nets.delta((64, 64, 3, 3), (4, 6, 3, 3), 0)})
    to_locon.write(adapter, tmp_path / "a.safetensors")
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    assert shapes == {
        "lycoris_c.alpha": (),
        "lycoris_c.lora_down.weight": (6, 64, 1, 1),
        "lycoris_c.lora_mid.weight": (6, 6, 3, 3),
        "lycoris_c.lora_up.weight": (64, 6, 1, 1),
    }


def test_ranks_that_differ_are_written_as_patterns_of_whole_names(tmp_path: Path) -> None:
    deltas = {"a.weight": (9, 8), "x.a.weight": (9, 8), "b.weight": (7, 8)}
    ranks = {"a.weight": 2, "x.a.weight": 3, "b.weight": 3}
    adapter = Adapter({name: nets.delta(shape, (ranks[name],) * 2, 0) for name, shape in deltas.items()})
    to_peft_lora.write(adapter, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {"^a": 2}, {"^a": 2})
    read = load_adapter(tmp_path / "lora")
    for name, delta in adapter.deltas.items():
        np.testing.assert_allclose(read.deltas[name].dense(), delta.dense(), atol=1e-6)


class TestRefused:
    def test_a_gain(self, tmp_path: Path) -> None:
        adapter = Adapter({}, gains={"w.weight": np.ones((3, 1), np.float32)})
        for write in (to_peft_lora.write, to_locon.write):
            with pytest.raises(FormatError, match=r"'w.weight'.*got a gain.*export it folded"):
                write(adapter, tmp_path / "out")

    def test_what_is_no_modules_weight(self, tmp_path: Path) -> None:
        adapter = Adapter({"attention.in_proj_weight": nets.delta((9, 3), (2, 2), 0)})
        for write in (to_peft_lora.write, to_locon.write):
            with pytest.raises(FormatError, match="in_proj_weight"):
                write(adapter, tmp_path / "out")
        inside = Adapter({"attention.out_proj.weight": nets.delta((8, 8), (2, 2), 0)})
        with pytest.raises(FormatError, match="MultiheadAttention"):
            to_peft_lora.write(inside, tmp_path / "out", base=view(nets.attention_net()[0]))

    def test_names_that_underscores_make_equal(self, tmp_path: Path) -> None:
        adapter = Adapter({name: nets.delta((8, 9), (2, 2), 0) for name in ("a.b_c.weight", "a_b.c.weight")})
        with pytest.raises(FormatError, match=r"'a_b.c'.*'a.b_c' as well"):
            to_locon.write(adapter, tmp_path / "out.safetensors")

    def test_whole_tensors_in_a_locon(self, tmp_path: Path, adapter: Adapter) -> None:
        with pytest.raises(FormatError, match="Give --base"):
            to_locon.write(adapter, tmp_path / "out.safetensors")
        wide = Adapter({}, {"head.weight": np.zeros((7, 8), np.float32)})
        with pytest.raises(FormatError, match="another shape than the base's"):
            to_locon.write(wide, tmp_path / "out.safetensors", base=view(mixed()))
        assert not list(tmp_path.iterdir())


def test_transposed_layers_of_transformers(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.ModuleDict({"wide": Conv1D(24, 16), "square": Conv1D(16, 16), "plain": nn.Linear(16, 16)}).eval()
    adapter = nets.adapter_for(base, {f"{name}.weight": (2, 3) for name in base}, seed=4)
    to_peft_lora.write(adapter, tmp_path / "lora", base=view(base))
    assert_same(load_adapter(tmp_path / "lora", base=base), adapter, base)
    expected = merged(base, adapter)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        got = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").base_model.model
    x = torch.randn(3, 16)
    for name in base:
        with torch.no_grad():
            one, other = got[name](x), expected.get_submodule(name)(x)
        assert (one - other).norm() <= 1e-5 * other.norm(), name
