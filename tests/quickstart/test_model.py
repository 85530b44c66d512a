from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from tpeft_deploy.quickstart.model import WEIGHTS, DigitsNet, digits, trained
from tpeft_deploy.quickstart.train import TARGETS


def test_it_has_about_45_thousand_weights_of_every_kind() -> None:
    net = DigitsNet()
    assert 40_000 < sum(weight.numel() for weight in net.parameters()) < 50_000
    adapted = [module for name, module in net.named_modules() if name.rpartition(".")[2] in TARGETS]
    convolutions = [module for module in adapted if isinstance(module, nn.Conv2d)]
    assert sum(isinstance(module, nn.Linear) for module in adapted) == 4
    assert sorted(module.groups for module in convolutions) == [1, 1, 32, 64]
    assert any(module.stride == (2, 2) for module in convolutions)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_logits_for_any_number_of_rows(rows: int) -> None:
    net, _ = digits()
    with torch.inference_mode():
        answers = net(pixels=torch.rand(rows, 1, 16, 16))
    assert set(answers) == {"logits"}
    assert answers["logits"].shape == (rows, 10)


def test_rows_do_not_depend_on_each_other() -> None:
    net, _ = digits()
    nn.init.normal_(net.early.respond.gamma)  # zero at first, which would hide a norm over the batch
    pixels = torch.rand(5, 1, 16, 16)
    with torch.inference_mode():
        together = net(pixels)["logits"]
        alone = torch.cat([net(row[None])["logits"] for row in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_the_example_inputs_fit() -> None:
    net, example_inputs = digits()
    assert not net.training
    assert example_inputs["pixels"].shape[1:] == (1, 16, 16)
    net(**example_inputs)


def test_trained_reads_the_saved_weights(tmp_path: Path) -> None:
    saved = DigitsNet()
    (tmp_path / WEIGHTS).write_bytes(save(saved.state_dict()))
    net, example_inputs = trained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(net(**example_inputs)["logits"], saved.eval()(**example_inputs)["logits"])
