"""What is refused, and that each message says why and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lycoris.modules.tlora import TLoraModule
from torch import Tensor, nn

from tests.helpers.formats.trained import lycoris_file, save
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.formats.lycoris.refusals import REFUSALS


def base() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"fc": nn.Linear(12, 16), "conv": nn.Conv2d(12, 16, 3, groups=2), "bare": nn.Linear(3, 2, False)}
    )


def refusal(path: Path, base: nn.Module | None, scale: float | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        load_adapter(path, base=base, scale=scale)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def refused(path: Path, tensors: dict[str, Tensor], with_base: bool = True, scale: float | None = None) -> str:
    return refusal(save(path / "a.safetensors", tensors), base() if with_base else None, scale)


def test_t_lora(tmp_path: Path) -> None:
    wrapper = TLoraModule("lycoris_fc", base()["fc"], lora_dim=4)
    file = lycoris_file(tmp_path / "a.safetensors", {"lycoris_fc": wrapper})
    message = refusal(file, base())
    assert "module 'lycoris_fc'" in message
    assert "SVD" in message
    assert "export the merged model" in message


@pytest.mark.parametrize("suffix", REFUSALS)
def test_every_row_of_the_table(tmp_path: Path, suffix: str) -> None:
    beside = {"fc.b1.weight": torch.ones(2, 2)} if suffix == "bm.weight" else {}
    message = refused(tmp_path, {f"fc.{suffix}": torch.ones(2, 2, 2), "fc.alpha": torch.tensor(1.0)} | beside)
    assert f"tensor {suffix!r}" in message
    assert " ".join(REFUSALS[suffix].problem.split()) in message
    assert message.endswith(REFUSALS[suffix].fix)


def test_layers_of_the_base_that_have_such_names_are_not_mistaken(tmp_path: Path) -> None:
    """A FLoRA file holds the whole model."""
    names = ("q_layer", "bm", "a1")
    layers = nn.ModuleDict({"fc": nn.Linear(12, 16)} | {name: nn.Linear(3, 3) for name in names})
    base = nn.ModuleDict({"block": layers})
    tensors = {f"model.{n.replace('fc.', 'fc.base_layer.')}": tensor for n, tensor in base.state_dict().items()}
    sizes = {"G": (2, 2), "0": (12, 2), "1": (16, 2)}
    tensors |= {f"model.block.fc.flora_layer.param_{name}": torch.ones(size) for name, size in sizes.items()}
    tensors["model.block.q_layer.weight"] = torch.zeros(3, 3)
    adapter = load_adapter(save(tmp_path / "a.safetensors", tensors), base=base, scale=1.0)
    assert set(adapter.deltas) == {"block.fc.weight"}
    assert set(adapter.overrides) == {"block.q_layer.weight"}


def loha(out: int = 16, inputs: int = 12) -> dict[str, Tensor]:
    shapes = {"w1_a": (out, 2), "w1_b": (2, inputs), "w2_a": (out, 2), "w2_b": (2, inputs)}
    return {f"fc.hada_{name}": torch.ones(shape) for name, shape in shapes.items()}


class TestBase:
    @pytest.mark.parametrize(
        "tensors",
        [
            loha(),
            {"fc.lokr_w1": torch.ones(2, 2), "fc.lokr_w2": torch.ones(8, 6)},
            {"fc.w_norm": torch.ones(3)},
            {"fc.diff_b": torch.ones(3)},
            {"fc.diff": torch.ones(3)},
            {"fc.weight": torch.ones(16), "fc.on_input": torch.tensor(0)},
            {f"fc.{name}.weight": torch.ones(2, 2) for name in ("a1", "a2", "b1", "b2")},
            {
                "fc.lora_up.weight": torch.ones(16, 2),
                "fc.lora_down.weight": torch.ones(2, 12),
                "fc.dora_scale": torch.ones(16, 1),
            },
        ],
        ids=["loha", "lokr", "norm", "bias", "diff of a norm", "ia3", "glora", "dora"],
    )
    def test_is_asked_for(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        assert "Give base=" in refused(tmp_path, tensors, with_base=False)

    def test_of_another_shape(self, tmp_path: Path) -> None:
        assert "weight's shape (16, 12), got (17, 12)" in refused(tmp_path, loha(17))
        assert "(16,), as the base's bias, got (3,)" in refused(tmp_path, {"fc.diff_b": torch.ones(3)})

    def test_without_the_bias(self, tmp_path: Path) -> None:
        assert "'bare.bias' in ModuleDict" in refused(tmp_path, {"bare.diff_b": torch.ones(2)})

    def test_dora_scale_of_another_shape(self, tmp_path: Path) -> None:
        tensors = {
            "fc.lora_up.weight": torch.ones(16, 2),
            "fc.lora_down.weight": torch.ones(2, 12),
            "fc.dora_scale": torch.ones(16),
        }
        assert "dora_scale of shape (16, 1) or (1, 12)" in refused(tmp_path, tensors)

    def test_ia3_on_the_inputs_of_a_grouped_convolution(self, tmp_path: Path) -> None:
        tensors = {"conv.weight": torch.ones(1, 12, 1, 1), "conv.on_input": torch.tensor(1)}
        message = refused(tmp_path, tensors)
        assert "each of the inputs of a weight of shape (16, 6, 3, 3), got shape (1, 12, 1, 1)" in message
        assert "grouped" in message


class TestTensors:
    def test_a_missing_half(self, tmp_path: Path) -> None:
        tensors = loha()
        del tensors["fc.hada_w2_b"]
        assert "expected a tensor hada_w2_b" in refused(tmp_path, tensors)

    def test_halves_of_two_ranks(self, tmp_path: Path) -> None:
        shapes = {"w1_a": (2, 1), "w1_b": (1, 2), "w2_a": (8, 2), "w2_b": (2, 6)}
        tensors = {f"fc.lokr_{name}": torch.ones(shape) for name, shape in shapes.items()}
        assert "both halves of one rank, got ranks [1, 2]" in refused(tmp_path, tensors)

    def test_one_tucker_core_of_two(self, tmp_path: Path) -> None:
        assert "expected a tensor hada_t2" in refused(tmp_path, loha() | {"fc.hada_t1": torch.ones(2, 2)})

    def test_on_input_of_neither_side(self, tmp_path: Path) -> None:
        tensors = {"fc.weight": torch.ones(16), "fc.on_input": torch.tensor(2)}
        assert "expected on_input 0 or 1, got 2" in refused(tmp_path, tensors)

    def test_a_scale_beside_alpha(self, tmp_path: Path) -> None:
        message = refused(tmp_path, loha() | {"fc.alpha": torch.tensor(1.0)}, scale=2.0)
        assert message.endswith("got scale=2.0. Leave scale out.")

    def test_a_tensor_that_nothing_reads(self, tmp_path: Path) -> None:
        assert "dora_scale" in refused(tmp_path, {"fc.diff": torch.ones(16, 12), "fc.dora_scale": torch.ones(16, 1)})

    def test_two_full_halves_ignore_alpha(self, tmp_path: Path) -> None:
        """ai-toolkit leaves 1e10 there."""
        tensors = {"fc.lokr_w1": torch.ones(2, 2), "fc.lokr_w2": torch.ones(8, 6), "fc.alpha": torch.tensor(1e10)}
        adapter = load_adapter(save(tmp_path / "a.safetensors", tensors), base=base())
        assert (adapter.deltas["fc.weight"].dense() == 1).all()
