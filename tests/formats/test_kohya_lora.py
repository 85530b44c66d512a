"""Up and down matrices under the names of every generation, and the alpha rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.formats.trained import save
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats import kohya_lora, load_adapter
from tpeft_deploy.formats.read.module import Checkpoint, Module
from tpeft_deploy.tucker import Array

RANK, OUT, IN = 3, 40, 30


def base() -> nn.Module:
    model = nn.Module()
    model.mid_block = nn.ModuleDict({"to_q": nn.Linear(IN, OUT), "conv": nn.Conv2d(IN, OUT, 3)})
    return model


def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(OUT, RANK), torch.randn(RANK, IN)


def read(path: Path, tensors: dict[str, Tensor], scale: float | None = None, **metadata: str) -> Adapter:
    return load_adapter(save(path / "a.safetensors", tensors, metadata or None), base=base(), scale=scale)


def refused(path: Path, tensors: dict[str, Tensor], scale: float | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        read(path, tensors, scale)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["lora_unet_mid_block_to_q", "lycoris_mid_block_to_q", "mid_block.to_q"])
@pytest.mark.parametrize(
    ("up", "down"),
    [
        (".lora_up.weight", ".lora_down.weight"),
        (".lora.up.weight", ".lora.down.weight"),
        ("_lora.up.weight", "_lora.down.weight"),
        (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    ],
)
def test_spellings(tmp_path: Path, prefix: str, up: str, down: str) -> None:
    b, a = pair()
    adapter = read(tmp_path, {prefix + up: b, prefix + down: a, f"{prefix}.alpha": torch.tensor(1.5)})
    delta = adapter.deltas["mid_block.to_q.weight"]
    assert delta.ranks == (RANK, RANK)
    np.testing.assert_allclose(delta.dense(), 0.5 * (b.double() @ a.double()).numpy(), rtol=1e-12)
    assert not adapter.notes


class TestAlpha:
    def tensors(self, **more: Tensor) -> dict[str, Tensor]:
        b, a = pair()
        named = {"lora_up.weight": b, "lora_down.weight": a} | more
        return {f"lora_unet_mid_block_to_q.{name}": tensor for name, tensor in named.items()}

    def test_missing_is_a_scale_of_one_and_said(self, tmp_path: Path) -> None:
        adapter = read(tmp_path, self.tensors())
        assert adapter.deltas["mid_block.to_q.weight"].scale == 1
        assert "no alpha" in adapter.notes["mid_block.to_q.weight"]

    def test_missing_takes_the_callers_scale(self, tmp_path: Path) -> None:
        assert read(tmp_path, self.tensors(), scale=0.25).deltas["mid_block.to_q.weight"].scale == 0.25

    def test_present_refuses_the_callers_scale(self, tmp_path: Path) -> None:
        assert "Leave scale out" in refused(tmp_path, self.tensors(alpha=torch.tensor(1.0)), scale=0.25)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_of_any_shape_with_one_number(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        adapter = read(tmp_path, self.tensors(alpha=torch.full(shape, 6, dtype=torch.float16)))
        assert adapter.deltas["mid_block.to_q.weight"].scale == 2

    def test_infinite_in_float16(self, tmp_path: Path) -> None:
        message = refused(tmp_path, self.tensors(alpha=torch.tensor(1e10).half()))
        assert "alpha" in message
        assert "finite" in message

    def test_infinite_as_the_reader_itself_sees_it(self) -> None:
        tensors: dict[str, Array] = {
            "lora_up.weight": np.ones((4, 2)),
            "lora_down.weight": np.ones((2, 4)),
            "alpha": np.array(np.inf, np.float16),
        }
        with pytest.raises(FormatError, match=r"expected one finite number as alpha.*float16 ends at 65504"):
            kohya_lora.read_kohya_lora.read(Module("fc", tensors, "fc", Checkpoint("file", {}, {}, None, None)))

    def test_of_several_numbers(self, tmp_path: Path) -> None:
        assert "expected one finite number as alpha" in refused(tmp_path, self.tensors(alpha=torch.ones(RANK)))


class TestShapes:
    def conv(self, **tensors: Tensor) -> dict[str, Tensor]:
        return {f"mid_block.conv.lora_{name}.weight": tensor for name, tensor in tensors.items()}

    def test_half_a_pair(self, tmp_path: Path) -> None:
        assert "expected a tensor lora_down.weight" in refused(tmp_path, self.conv(up=torch.ones(OUT, RANK)))

    def test_two_ranks(self, tmp_path: Path) -> None:
        message = refused(tmp_path, self.conv(up=torch.ones(OUT, 2, 1, 1), down=torch.ones(RANK, IN, 3, 3)))
        assert "module 'mid_block.conv'" in message
        assert "do not fit" in message

    def test_an_up_with_a_kernel(self, tmp_path: Path) -> None:
        message = refused(tmp_path, self.conv(up=torch.ones(OUT, RANK, 3, 3), down=torch.ones(RANK, IN, 1, 1)))
        assert "up has shape (40, 3, 3, 3)" in message

    def test_no_rank_at_all(self, tmp_path: Path) -> None:
        tensors = self.conv(up=torch.ones(OUT, 0, 1, 1), down=torch.ones(0, IN, 3, 3))
        assert "values in lora_down.weight" in refused(tmp_path, tensors)
        assert "values in lora" in refused(tmp_path, tensors | {"mid_block.conv.alpha": torch.tensor(1.0)})

    def test_tucker_is_read_as_it_is(self, tmp_path: Path) -> None:
        tensors = self.conv(
            up=torch.ones(OUT, RANK, 1, 1), down=torch.ones(RANK, IN, 1, 1), mid=torch.ones(RANK, RANK, 3, 3)
        )
        assert read(tmp_path, tensors).deltas["mid_block.conv.weight"].ranks == (RANK, RANK, 3, 3)


def test_dylora_is_said(tmp_path: Path) -> None:
    b, a = pair()
    tensors = {"mid_block.to_q.lora_up.weight": b, "mid_block.to_q.lora_down.weight": a}
    adapter = read(tmp_path, tensors, ss_network_args='{"algo": "dylora"}')
    assert "DyLoRA" in adapter.notes["mid_block.to_q.weight"]
