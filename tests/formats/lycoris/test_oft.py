"""LyCORIS' diag-OFT and BOFT, against LyCORIS' own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from torch import Tensor, nn

from tests.helpers.formats.trained import KINDS, error_of, lycoris_file, net, randomise, rows, save
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats import load_adapter

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
METHODS = {"diag-oft": DiagOFTModule, "boft": ButterflyOFTModule}
LAYER, HEAD = "lycoris_block_in_layer", "lycoris_head"


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("method", METHODS)
class TestForward:
    @pytest.fixture(autouse=True)
    def in_float64(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        """LyCORIS inverts in float32, and fails for float64: here it inverts in the dtype that it computes in."""
        monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)
        if dtype == torch.float64:
            monkeypatch.setattr("lycoris.functional.diag_oft.torch.eye", eye)

    def error(self, path: Path, method: str, kind: str, dtype: torch.dtype, **arguments: Any) -> float:
        model, x = net(kind, dtype), rows(kind, dtype)
        layers: dict[str, nn.Module] = {LAYER: model.block["in_layer"]}
        size = 4
        if method == "diag-oft":
            layers[HEAD] = model.head
        else:  # a butterfly needs an even size and a power of 2 of blocks: no head of 3 outputs
            size = {"linear": 18, "depthwise": 4}.get(kind, 6)
        wrappers = {name: METHODS[method](name, layer, lora_dim=size, **arguments) for name, layer in layers.items()}
        for seed, wrapper in enumerate(wrappers.values()):
            wrapper.to(dtype).eval().apply_to()
            randomise(wrapper, seed)
        file = lycoris_file(path / "adapter.safetensors", wrappers)
        with torch.no_grad():
            expected = model(x)
        error = error_of(file, net(kind, dtype), x, expected)
        digests = load_adapter(file, base=net(kind, dtype)).base_digests
        weight = net(kind, dtype).get_parameter("block.in_layer.weight").detach().numpy()
        assert digests["block.in_layer.weight"] == weight_digest(weight)
        return error

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_layer(self, tmp_path: Path, method: str, kind: str, dtype: torch.dtype) -> None:
        assert self.error(tmp_path, method, kind, dtype) <= LIMITS[dtype]

    @pytest.mark.parametrize("kind", ["linear", "conv2d"])
    @pytest.mark.parametrize("constraint", [0.25, 100.0], ids=["reached", "not reached"])
    def test_constrained_and_rescaled(
        self, tmp_path: Path, method: str, kind: str, dtype: torch.dtype, constraint: float
    ) -> None:
        assert self.error(tmp_path, method, kind, dtype, constraint=constraint, rescaled=True) <= LIMITS[dtype]


def eye(size: int, **arguments: Any) -> Tensor:
    identity = torch.zeros(size, size, dtype=torch.float64)
    identity.fill_diagonal_(1)
    return identity


class TestRefusals:
    def refusal(self, path: Path, with_base: bool = True, scale: float | None = None, **changes: Tensor | None) -> str:
        base = nn.ModuleDict({"fc": nn.Linear(12, 16)})
        tensors = {"oft_blocks": torch.ones(4, 4, 4), "alpha": torch.tensor(0.0)} | changes
        file = save(path / "a.safetensors", {f"fc.{name}": t for name, t in tensors.items() if t is not None})
        with pytest.raises(FormatError) as caught:
            load_adapter(file, base=base if with_base else None, scale=scale)
        return str(caught.value)

    def test_no_base(self, tmp_path: Path) -> None:
        assert "Give base=" in self.refusal(tmp_path, with_base=False)

    def test_a_scale(self, tmp_path: Path) -> None:
        assert "Leave scale out" in self.refusal(tmp_path, scale=2.0)

    @pytest.mark.parametrize(
        "shape", [(4, 3, 3), (5, 4, 4), (4, 4), (4, 4, 3), (2, 16, 1, 1), (1, 4, 4, 5), (0, 4, 4, 4)]
    )
    def test_blocks_of_another_shape(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        assert "module 'fc'" in self.refusal(tmp_path, oft_blocks=torch.ones(shape))

    def test_too_many_levels_of_a_butterfly(self, tmp_path: Path) -> None:
        assert "level 3 of a butterfly" in self.refusal(tmp_path, oft_blocks=torch.ones(4, 4, 4, 4))

    @pytest.mark.parametrize("alpha", [None, torch.tensor(float("nan")), torch.ones(2)])
    def test_alpha(self, tmp_path: Path, alpha: Tensor | None) -> None:
        assert "alpha" in self.refusal(tmp_path, alpha=alpha)

    def test_rescale_of_another_shape(self, tmp_path: Path) -> None:
        assert "rescale of shape (16,)" in self.refusal(tmp_path, rescale=torch.ones(16))
