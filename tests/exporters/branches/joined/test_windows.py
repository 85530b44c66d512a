"""Which banked convs add their taps by Col2Im, on the CPU, and by a window, on CUDA; answers are PEFT's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.helpers.exporters.matrix import error
from tpeft_deploy import Bundle, Runtime, export_bundle, load_adapter
from tpeft_deploy.bundle.directory import BANKED_CUDA
from tpeft_deploy.exporters.branches.conv import mirrored_pads

MOVE_BY_ONE = 3


class Convs(nn.Module):
    """Convs of which the first three move by one pixel, and have no more pads than Col2Im can take."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(4, 12, 3, padding=1)
        self.oblong = nn.Conv2d(12, 12, (3, 2), padding=(2, 1))
        self.narrow = nn.Conv2d(12, 12, (1, 3))
        self.strided = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.padded = nn.Conv2d(12, 12, 2, padding=2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            pixels = layer(pixels)
        return pixels


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, torch.Tensor, dict[str, Any]]:
    """A bundle, an input, and PEFT's answers by task."""
    place, adapters, expected = tmp_path_factory.mktemp("windows"), {}, {}
    pixels = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in Convs().named_children()]

    def base() -> nn.Module:
        torch.manual_seed(0)
        return Convs().eval()

    for seed, task in enumerate(("one", "other"), start=1):
        model: Any = base()
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(r=2 + seed, target_modules=names, init_lora_weights=False)).eval()
        with torch.no_grad():
            expected[task] = model(pixels).numpy()
        model.save_pretrained(place / task)
        adapters[task] = load_adapter(place / task)
    free = {"pixels": {0: "batch"}}
    bundle = export_bundle(
        base(), adapters, place / "bundle", example_inputs={"pixels": pixels[:2]}, dynamic_shapes=free
    )
    return bundle, pixels, expected


def functions(path: Path) -> Counter[str]:
    graph = onnx.load(path, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node if node.op_type.startswith("BankedConv"))


def test_answers_are_those_of_peft(answers: tuple[Bundle, torch.Tensor, dict[str, Any]]) -> None:
    bundle, pixels, expected = answers
    tasks = ["other", "one", "other"]
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        (found,) = runtime.run({"pixels": pixels.numpy()}, tasks=tasks).values()
    wanted = np.stack([expected[task][row] for row, task in enumerate(tasks)])
    assert error(np.asarray(found), wanted) <= 1e-5


def test_col2im_adds_the_taps_of_convs_that_move_by_one(answers: tuple[Bundle, Any, Any]) -> None:
    found = functions(answers[0].path / "banked.onnx")
    assert found["BankedConvUpCol2Im"] == MOVE_BY_ONE
    assert found.total() == len(list(Convs().children()))


def test_cuda_has_windows_instead(answers: tuple[Bundle, Any, Any]) -> None:
    found = functions(answers[0].path / BANKED_CUDA)
    assert found["BankedConvUpCol2Im"] == 0
    assert found.total() == len(list(Convs().children()))


def test_pads_that_are_mirrored_twice_are_as_before() -> None:
    pads = [0, 2, 1, 3]
    assert mirrored_pads((3, 2), (2, 3), mirrored_pads((3, 2), (2, 3), pads)) == pads
