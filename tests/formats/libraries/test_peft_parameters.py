from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from tests.helpers.formats.pefts import error_of, peft_model, refusal, save
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.formats.read.module import BaseView


class Experts(nn.Module):
    """All experts on all rows, summed; is_transposed is what transformers calls experts with inputs first."""

    def __init__(self, experts: int, hidden: int, inner: int, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = torch.randn(experts, hidden, inner) / 3, torch.randn(experts, inner, hidden) / 3
        self.up = nn.Parameter(up if is_transposed else up.mT.contiguous())
        self.shift = nn.Parameter(torch.randn(experts, inner))
        self.down = nn.Parameter(down if is_transposed else down.mT.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        inner = torch.tanh(torch.einsum("bh,ehi->bei", x, up) + self.shift)
        return torch.einsum("bei,eih->bh", inner, down)


class Mixture(nn.Module):
    def __init__(self, experts: int, hidden: int, inner: int, *, is_transposed: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(6, hidden)
        self.mlp = nn.ModuleDict({"experts": Experts(experts, hidden, inner, is_transposed=is_transposed)})
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.mlp["experts"](torch.tanh(self.fc(x)))))
        return out


def mixture(
    experts: int, hidden: int = 8, inner: int = 10, dtype: torch.dtype = torch.float64, *, is_transposed: bool = False
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Mixture(experts, hidden, inner, is_transposed=is_transposed)
    return model.eval().to(dtype), torch.randn(5, 6, dtype=dtype)


def lora(*parameters: str, modules: tuple[str, ...] = (), **options: object) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, target_modules=list(modules), target_parameters=list(parameters), **options)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.float64, 1e-9)])
class TestAgainstPeft:
    @pytest.mark.parametrize("is_transposed", [False, True])
    @pytest.mark.parametrize("size", [pytest.param((4, 8, 10), id="dense"), pytest.param((2, 40, 30), id="low rank")])
    def test_two_parameters_of_a_module_and_a_layer(
        self, tmp_path: Path, dtype: torch.dtype, limit: float, size: tuple[int, int, int], is_transposed: bool
    ) -> None:
        base, x = mixture(*size, dtype, is_transposed=is_transposed)
        config = lora("mlp.experts.up", "experts.down", modules=("fc",), rank_pattern={"experts.up": 3})
        error, adapter = error_of(base, x, config, tmp_path)
        assert error < limit
        assert set(adapter.deltas) == {"mlp.experts.up", "mlp.experts.down", "fc.weight"}

    def test_one_parameter(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = mixture(4, dtype=dtype)
        error, adapter = error_of(base, x, lora("experts.up"), tmp_path)
        assert error < limit
        assert set(adapter.deltas) == {"mlp.experts.up"}

    def test_a_matrix(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = mixture(1, dtype=dtype)
        error, adapter = error_of(base, x, lora("fc.weight", "experts.down"), tmp_path)
        assert error < limit
        assert set(adapter.deltas) == {"fc.weight", "mlp.experts.down"}


def test_needs_the_base(tmp_path: Path) -> None:
    base, _ = mixture(4)
    save(peft_model(base, lora("mlp.experts.up")), tmp_path)
    assert "Give base=" in refusal(tmp_path)


def test_needs_the_order_of_parameters(tmp_path: Path) -> None:
    # An ONNX file has names and values alone.
    base, _ = mixture(4)
    save(peft_model(base, lora("experts.up", "experts.down")), tmp_path)
    names = BaseView("model.onnx", {name: p.detach().numpy() for name, p in base.named_parameters()})
    with pytest.raises(FormatError, match="keeps the order of a module's parameters"):
        load_adapter(tmp_path, base=names)


def test_square_experts_are_refused(tmp_path: Path) -> None:
    base, _ = mixture(4, hidden=8, inner=8)
    save(peft_model(base, lora("mlp.experts.up")), tmp_path)
    assert "only the module's code defines whether outputs come first" in refusal(tmp_path, base)


def test_another_base(tmp_path: Path) -> None:
    base, _ = mixture(4)
    save(peft_model(base, lora("mlp.experts.up")), tmp_path)
    other, _ = mixture(3)
    assert "tensors for the parameter 'mlp.experts.up' of shape (3, 10, 8)" in refusal(tmp_path, other)
