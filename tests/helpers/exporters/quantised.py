"""A net with quantised linear layers."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn


class Net(nn.Module):
    """Linears on sequences, one with a bias; wide enough for blocks of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return y


TARGETS = {"first.weight": (3, 2), "second.weight": (2, 2), "head.weight": (2, 2)}


def quantise(path: Path, **options: object) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module, inputs = Net().eval(), {"x": torch.randn(2, 3, 64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (inputs["x"],),
            str(path),
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
            opset_version=17,
        )
        model = onnx.load(path)
        if "quant_format" in options:
            model = onnx.version_converter.convert_version(model, 21)
        quantiser = MatMulNBitsQuantizer(
            model, block_size=32, is_symmetric=True, accuracy_level=1, nodes_to_exclude=["/head/MatMul"], **options
        )
        quantiser.process()
    quantiser.model.save_model_to_file(str(path))
    return module, inputs
